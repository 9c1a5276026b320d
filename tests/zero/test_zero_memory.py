"""If this fails, a rank holds more than its share, or layers stay gathered after use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.data.dataloader import TrainDataLoader
from qlora_dist.launch.job_check import estimate_static_bytes as planned_bytes
from qlora_dist.layers.linear import QuantizedLinear
from qlora_dist.parallel.loaded_model import load_model, shard_model
from qlora_dist.parallel.static_bytes import check_static_bytes, model_static_bytes
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.shard_view import full_shape, full_tensor, local_tensor_and_offset
from qlora_dist.train.evaluation_loop import evaluate_model
from qlora_dist.train.run_setup import set_up_run
from tests.helpers import tiny_models
from tests.helpers.measured_step import gathered_bytes
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_large_config(tmp_path_factory.mktemp("zero-memory"))


class LiveBytes(TorchDispatchMode):
    """Peaks of the gathered bytes at matrix multiplications: 4-bit weights, and all other parameters."""

    def __init__(self, layers: list[torch.nn.Module]) -> None:
        super().__init__()
        packed = [m.packed for layer in layers for m in layer.modules() if isinstance(m, QuantizedLinear)]
        ids = {id(p) for p in packed}
        self.parameters = packed, [p for layer in layers for p in layer.parameters() if id(p) not in ids]
        self.peaks = [0, 0]
        self.samples = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.samples += 1
            now = [gathered_bytes(parameters) for parameters in self.parameters]
            self.peaks = [max(pair) for pair in zip(self.peaks, now, strict=True)]
        return func(*args, **(kwargs or {}))


def load_and_train(config: Config, tamper: str = "") -> dict[str, Any]:
    """Load, then run three steps with an evaluation between the first two. Return held and gathered bytes."""
    ranks = read_rank_info()
    setup = set_up_run(config, ranks)
    model, layers = setup.model, list(setup.model.model.layers)
    whole = {True: 0, False: 0}
    for parameter in model.parameters():
        whole[parameter.requires_grad] += parameter.nbytes
    layer = sum(p.nbytes for p in layers[0].parameters() if p.dtype == torch.uint8)
    planned = sum(planned_bytes(model, setup.sizes, config)) - 12 * whole[True] / 4 / setup.sizes.adapter_shards
    with process_group(ranks, torch.device("cpu")):
        loaded = load_model(shard_model(model, config, ranks, setup.device), setup.folder)
        base = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        shards = {
            n: (local_tensor_and_offset(p)[1][0], local_tensor_and_offset(p)[0].view(torch.uint8).numpy().tobytes())
            for n, p in base.items()
        }
        if tamper:
            layers[0].unshard()
        try:
            held: int | str = check_static_bytes(model, setup.sizes)
        except RuntimeError as error:
            return {"held": str(error)}
        loader: TrainDataLoader = setup.loader
        live = LiveBytes(layers)
        for step in range(3):
            with live:
                for last, batch in zip((False, True), loader.micro_batches(step)[:2], strict=True):
                    model.set_requires_gradient_sync(last)
                    model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels).backward()
            if step == 0:
                evaluate_model(model, setup.eval_batches, loaded.traffic)
        same = all(
            shards[n][1] == local_tensor_and_offset(p)[0].view(torch.uint8).numpy().tobytes() for n, p in base.items()
        )
        return {
            "held": held,
            "planned": planned,
            "held after": model_static_bytes(model),
            "base": whole[False],
            "adapters": whole[True],
            "read": loaded.read_bytes,
            "layer": layer,
            "live": live.peaks,
            "samples": live.samples,
            "same": same,
            "shards": shards,
            "a": full_tensor(layers[1].mlp.up_proj.lora_A["default"].weight).tolist(),
            "shape": full_shape(layers[1].mlp.up_proj.lora_A["default"].weight),
        }


@pytest.fixture(scope="module")
def alone(config_path: Path) -> dict[str, Any]:
    """Results of FSDP2 in one process."""
    return run_ranks(1, load_and_train, load_config(config_path, ["parallel.base=world", "train.micro_batch=6"]))[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "nodes", "base_shards", "overrides"),
    [
        (2, 1, 2, ("parallel.base=world", "parallel.prefetch=0")),
        (3, 1, 3, ("parallel.base=world", "parallel.prefetch=1", "train.checkpointing=none")),
        (4, 2, 2, ("parallel.base=node", "parallel.prefetch=2", "model.base={source}")),
    ],
)
def test_a_rank_holds_its_share_and_gathers_a_layer(
    world_size: int, nodes: int, base_shards: int, overrides: tuple[str, ...], config_path: Path, alone: dict[str, Any]
) -> None:
    """A rank reads only its share, from a 4-bit folder or from one that is quantized while it is loaded."""
    source = config_path.parent / "source"
    config = load_config(config_path, ["parallel.engine=zero3", *(o.format(source=source) for o in overrides)])
    results = run_ranks(world_size, load_and_train, config, nodes=nodes)
    for result in results:
        # adapters are in fp32, and in bf16 for gathering
        share = result["base"] / base_shards + 1.5 * result["adapters"] / world_size
        assert result["held"] == pytest.approx(share, rel=0.01)
        assert result["planned"] == pytest.approx(share)  # without gradients and optimizer states
        assert result["held after"] == result["held"]
        assert result["samples"] > 100
        ahead = config.parallel.prefetch
        assert max(ahead, 1) * result["layer"] <= result["live"][0] <= (ahead + 1) * result["layer"]
        assert result["live"][1] <= (ahead + 1) * result["adapters"] / 2 / 4 * 1.05  # adapters in bf16, and norms
        assert result["same"]
        assert result["shape"] == torch.tensor(result["a"]).shape and result["a"] == results[0]["a"]
    if not source.samefile(config.model.base):
        assert all(result["read"] <= 1.05 * result["base"] / world_size for result in results)
    # the ranks' parts together are the whole parameter of one process
    for name, (_, whole) in alone["shards"].items():
        assert b"".join(result["shards"][name][1] for result in results[:base_shards]) == whole, name


def test_a_layer_that_stays_gathered_is_an_error(config_path: Path) -> None:
    config = load_config(config_path, ["parallel.base=world", "parallel.engine=zero3"])
    for result in run_ranks(2, load_and_train, config, "keeps a gathered layer"):
        assert "holds" in result["held"] and "share" in result["held"]
