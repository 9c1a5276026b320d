"""If this fails, reported, planned and sent bytes differ, or the base is sent between nodes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.parallel.loaded_model import load_trainable_model, shard_model
from qlora_dist.plan.model_spec import make_model_spec
from qlora_dist.plan.step_traffic import ShardCounts, step_traffic
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.train_step import make_step_context, train_step
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks

# (ranks, nodes, base, adapter)
LAYOUTS = [
    (2, 1, "world", "world"),
    (3, 1, "world", "world"),
    (4, 2, "node", "world"),
    (4, 2, "node", "node"),
    (4, 1, "replicate", "world"),
    (4, 2, "world", "node"),
    (4, 2, "paged", "world"),
]


TWO_MESHES, ONE_MESH_UNEVEN = LAYOUTS[2], LAYOUTS[1]
CASES = [
    *(("untied", "bf16", layout) for layout in LAYOUTS),
    # other element sizes; tied embeddings, which are gathered once and stay for the head
    *(pytest.param("untied", "fp32", layout, marks=pytest.mark.slow) for layout in (ONE_MESH_UNEVEN,)),
    *(pytest.param("tied", "bf16", layout, marks=pytest.mark.slow) for layout in (ONE_MESH_UNEVEN, LAYOUTS[3])),
]


def parallel_overrides(layout: tuple[int, int, str, str]) -> list[str]:
    """Return a layout's overrides, with two or three micro-batches to a step of twelve rows."""
    world_size, _, base, adapter = layout
    overrides = [f"parallel.base={base}", f"parallel.adapter={adapter}", f"train.micro_batch={6 // world_size}"]
    return [*overrides, "parallel.resident_bytes=0"] if base == "paged" else overrides


class Collective(NamedTuple):
    name: str
    ranks: tuple[int, ...]
    dtype: torch.dtype
    received_bytes: int


class CollectiveRecorder(TorchDispatchMode):
    """Counter of all collectives in torch's dispatcher, which is independent of the tested code."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            flat, _ = torch.utils._pytree.tree_flatten(args)
            tensors = [x for x in flat if isinstance(x, torch.Tensor)]
            group = next(dist.ProcessGroup.unbox(x) for x in flat if isinstance(x, torch.ScriptObject))
            ranks = tuple(dist.get_process_group_ranks(group))
            sizes = [t.nbytes for t in tensors]
            if name in ("_allgather_base_", "_reduce_scatter_base_"):
                received = abs(sizes[0] - sizes[1])
            elif name == "allreduce_":
                received = 2 * sizes[0] * (len(ranks) - 1) // len(ranks)
            else:
                raise AssertionError(f"a collective that no formula knows: {name}")
            self.collectives.append(Collective(name, ranks, tensors[0].dtype, received))
        return func(*args, **(kwargs or {}))


def record_two_steps(config: Config) -> tuple[list[Collective], dict[str, int], int]:
    """Return the second step's traffic as the dispatcher and the run count it, and its number of micro-batches."""
    ranks = read_rank_info()
    setup = set_up_run(config, ranks)
    with process_group(ranks, setup.device):
        loaded = load_trainable_model(shard_model(setup.model, config, ranks, setup.device), setup.folder)
        traffic = loaded.traffic
        context = make_step_context(setup, loaded)
        for step in range(2):
            traffic.take()
            with CollectiveRecorder() as wire:
                train_step(context, setup.loader.micro_batches(step), setup.loader.loss_tokens(step))
        return wire.collectives, traffic.take(), setup.loader.gradient_accumulation


@pytest.fixture(scope="module", params=["untied", pytest.param("tied", marks=pytest.mark.slow)])
def config_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traffic")
    return tiny_models.make_config(
        folder, tiny_models.make_model(folder / "model", tie_word_embeddings=request.param == "tied")
    )


@pytest.mark.parametrize(("config_path", "compute_dtype", "layout"), CASES, indirect=["config_path"], ids=str)
def test_counted_sent_and_planned_bytes_are_equal(
    layout: tuple[int, int, str, str], compute_dtype: str, config_path: Path
) -> None:
    world_size, nodes, base, adapter = layout
    config = load_config(config_path, [*parallel_overrides(layout), f"model.compute_dtype={compute_dtype}"])
    results = run_ranks(world_size, record_two_steps, config, nodes=nodes)

    per_node = world_size // nodes
    shards = {"replicate": 1, "node": per_node, "world": world_size, "paged": per_node}
    sharding = ShardCounts(world_size, shards[base], shards[adapter])
    units = make_model_spec(json.loads((Path(config.model.base) / "config.json").read_text()), config.lora).units
    for wire, counted, accumulation in results:
        planned = step_traffic(units, sharding, accumulation, 2 if compute_dtype == "bf16" else 4)
        assert counted == planned
        assert sum(c.received_bytes for c in wire) == sum(planned.values())


@pytest.mark.parametrize("layout", [ONE_MESH_UNEVEN, TWO_MESHES], ids=str)
def test_embeddings_in_4_bit_are_sent_in_4_bit(layout: tuple[int, int, str, str], config_path: Path) -> None:
    world_size, nodes, *_ = layout
    config = load_config(config_path, [*parallel_overrides(layout), "model.embeddings=4bit"])
    model_config = json.loads((Path(config.model.base) / "config.json").read_text())
    units = make_model_spec(model_config, config.lora, embeddings="4bit").units
    sharding = ShardCounts(world_size, world_size // nodes, world_size)
    for wire, counted, accumulation in run_ranks(world_size, record_two_steps, config, nodes=nodes):
        planned = step_traffic(units, sharding, accumulation, 4)
        assert counted == planned
        assert sum(c.received_bytes for c in wire) == sum(planned.values())


def test_no_base_bytes_cross_the_outer_mesh_dimension(config_path: Path) -> None:
    config = load_config(config_path, [*parallel_overrides((4, 2, "node", "world")), "model.compute_dtype=bf16"])
    results = run_ranks(4, record_two_steps, config, nodes=2)
    base_only = make_model_spec(
        json.loads((Path(config.model.base) / "config.json").read_text()),
        config.lora.model_copy(update={"targets": ["no_layer"]}),
    ).units
    for rank, (wire, _, accumulation) in enumerate(results):
        inside = (0, 1) if rank < 2 else (2, 3)
        crossing = [c for c in wire if c.ranks != inside]
        staying = [c for c in wire if c.ranks == inside]
        assert {c.ranks for c in crossing} == {(0, 1, 2, 3)}
        # packed bytes are sent as uint8 together with frozen floats, adapters as bf16, and their gradients as fp32
        assert {c.dtype for c in crossing} == {torch.bfloat16, torch.float32, torch.float64}
        everything_of_the_base = step_traffic(base_only, ShardCounts(4, 2, 4), accumulation, 2)
        assert sum(c.received_bytes for c in staying) == everything_of_the_base["shard"]


def test_accumulation_sends_gradients_once(config_path: Path) -> None:
    config = load_config(config_path, ["parallel.base=world", "train.micro_batch=2"])
    ((wire, _, accumulation), _) = run_ranks(2, record_two_steps, config)
    assert accumulation == 3
    is_tied = json.loads((Path(config.model.base) / "config.json").read_text())["tie_word_embeddings"]
    counts = Counter(c.name for c in wire)
    layers = 3
    assert counts["_reduce_scatter_base_"] == layers
    others = 2 if is_tied else 3  # root, embedding and head; tied weights stay gathered for the head
    assert counts["_allgather_base_"] == accumulation * (2 * layers + others)
    assert counts["allreduce_"] == 1
