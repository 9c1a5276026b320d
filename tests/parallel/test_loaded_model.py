"""If this fails, a model is loaded with wrong weights, adapters or optimizer states, or a rank holds too much of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qlora_dist.adapters.attach import init_lora_weight
from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.io.read_ahead import ReadProgress
from qlora_dist.layers.linear import QuantizedLinear
from qlora_dist.model.meta_model import LossModel
from qlora_dist.parallel import loaded_model
from qlora_dist.parallel.loaded_model import TrainableModel, load_trainable_model, make_optimizer_state, shard_model
from qlora_dist.parallel.paged_layers import PagedLayers
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.heartbeat import last_heartbeat
from qlora_dist.runtime.process_group import process_group
from qlora_dist.shard_view import full_shape, full_tensor, local_tensor
from qlora_dist.train.run_setup import set_up_model
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory, tiny_llama_nf4: Path) -> Path:
    return tiny_models.make_config(tmp_path_factory.mktemp("loaded"), tiny_llama_nf4)


def load(config: Config, **callbacks: Any) -> TrainableModel:
    """Load on this rank, whose process group exists."""
    folder, model, _ = set_up_model(config)
    return load_trainable_model(shard_model(model, config, read_rank_info(), CPU), folder, **callbacks)


def loaded_parameters(config: Config) -> dict[str, list[float]]:
    """Return every parameter of the model, whole."""
    with process_group(read_rank_info(), CPU):
        loaded = load(config)
        values = {name: full_tensor(p) for name, p in loaded.model.named_parameters()}
        loaded.optimizer_state.close()
        return {name: tensor.detach().float().flatten().tolist() for name, tensor in values.items()}


def test_two_ranks_load_the_parameters_of_one(config_path: Path) -> None:
    (alone,) = run_ranks(1, loaded_parameters, load_config(config_path))
    for rank in run_ranks(2, loaded_parameters, load_config(config_path)):
        assert rank == alone


def check_values(config: Config) -> None:
    with process_group(read_rank_info(), CPU):
        folder, _, _ = set_up_model(config)
        loaded = load(config)
        key = "model.layers.1.mlp.up_proj"
        linear = loaded.model.get_submodule(key)
        base = getattr(linear, "base_layer", linear)
        assert isinstance(base, QuantizedLinear)
        packed = base.packed.full_tensor() if hasattr(base.packed, "full_tensor") else base.packed
        with safe_open(next(folder.path.glob("*.safetensors")), "pt") as file:
            codes = file.get_tensor(f"{key}.weight").flatten()
        assert torch.equal(packed[: len(codes)], codes)
        for name, parameter in loaded.model.named_parameters():
            if "lora_" in name:
                expected = init_lora_weight(name, full_shape(parameter), config.train.seed)
                assert expected is not None and torch.equal(full_tensor(parameter), expected), name
        loaded.optimizer_state.close()


def test_codes_equal_the_file_and_adapters_their_initial_values(config_path: Path) -> None:
    run_ranks(2, check_values, load_config(config_path, ["train.seed=3"]))


def record_order(config: Config) -> tuple[list[str], float]:
    events: list[str] = []
    make_state, read_weights = make_optimizer_state, loaded_model.load_weights
    check = loaded_model.check_static_bytes

    def traced(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return function(*args, **kwargs)

        return call

    loaded_model.make_optimizer_state = traced("optimizer state", make_state)
    loaded_model.load_weights = traced("weights", read_weights)
    loaded_model.check_static_bytes = traced("check", check)

    def fill_adapter(model: LossModel) -> None:
        events.append("adapter")

    def before_reading(pages: PagedLayers | None) -> None:
        events.append("pages" if pages is not None else "no pages")

    def on_read(progress: ReadProgress) -> None:
        if events[-1] != "read":
            events.append("read")
        assert last_heartbeat().phase == "loading"

    with process_group(read_rank_info(), CPU):
        loaded = load(config, fill_adapter=fill_adapter, before_reading=before_reading, on_read=on_read)
        assert loaded.read_bytes > 0 and loaded.load_s > 0
        pages = loaded.paged_layers
        held = loaded.static_bytes
        if pages is not None:
            assert held > pages.held_bytes and pages.held_bytes <= pages.budget
            pages.close()
        loaded.optimizer_state.close()
    return events, held


def test_memory_is_reserved_before_reading_and_checked_at_the_end(config_path: Path) -> None:
    rest = ["weights", "read", "adapter", "check"]
    ((events, whole),) = run_ranks(1, record_order, load_config(config_path))
    assert events == ["optimizer state", "no pages", *rest]
    paged = load_config(config_path, ["parallel.base=paged", "parallel.resident_bytes=0"])
    ((events, held),) = run_ranks(1, record_order, paged)
    assert events == ["optimizer state", "pages", *rest]
    assert held <= whole


def load_replicated(config: Config, loader: str) -> str:
    """Load with a weight that is whole on every rank, and return the error."""

    def keep_whole(model: LossModel) -> None:
        model.get_submodule("model.layers.0").kept = torch.zeros(10**6)

    with process_group(read_rank_info(), CPU):
        folder, model, _ = set_up_model(config)
        sharded = shard_model(model, config, read_rank_info(), CPU)
        try:
            getattr(loaded_model, loader)(sharded, folder, fill_adapter=keep_whole)
        except RuntimeError as error:
            return str(error)
    return "loaded"


@pytest.mark.parametrize("loader", ["load_model", "load_trainable_model"])
def test_a_replicated_weight_is_an_error(loader: str, config_path: Path) -> None:
    for message in run_ranks(2, load_replicated, load_config(config_path), loader):
        assert "where its share is" in message


def state_bytes(config: Config) -> tuple[int, int, int]:
    """Return the bytes of the optimizer states, their bits, and the elements of the adapters' shards."""
    with process_group(read_rank_info(), CPU):
        loaded = load(config)
        shards, state = loaded.adapter_shards, loaded.optimizer_state
        for shard, parameter in zip(
            shards.local, filter(lambda p: p.requires_grad, loaded.model.parameters()), strict=True
        ):
            assert shard.numel() == 0 or shard.data_ptr() == local_tensor(parameter).data_ptr()
        values = state.read()
        assert [set(v) for v in values] == [set() if s.numel() == 0 else set(values[0]) for s in shards.local]
        assert not any(tensor.any() for v in values for name, tensor in v.items() if name == "exp_avg_sq")
        held, bits = state.resident_bytes + state.paged_bytes, state.bits
        state.close()
        return held, bits, sum(shard.numel() for shard in shards.local)


@pytest.mark.parametrize(("name", "bits"), [("adamw", 32), ("adamw-8bit", 8)])
def test_optimizer_states_are_sharded_as_the_adapters(name: str, bits: int, config_path: Path) -> None:
    config = load_config(config_path, [f"optim.name={name}"])
    ((_, _, whole),) = run_ranks(1, state_bytes, config)
    ranks = run_ranks(2, state_bytes, config)
    assert sum(elements for _, _, elements in ranks) == whole
    for held, rank_bits, elements in ranks:
        assert rank_bits == bits
        assert held >= 2 * elements * bits // 8
