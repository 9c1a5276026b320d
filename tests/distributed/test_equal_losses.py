"""If this fails, adding a rank, a node or a mesh changes what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import adapter_difference

# (ranks, nodes, base, adapter); the others are compared with the first
LAYOUTS = {
    "1 rank": (1, 1, "world", "world"),
    "2 ranks": (2, 1, "world", "world"),
    "3 ranks, uneven shards": (3, 1, "world", "world"),
    "4 ranks": (4, 1, "world", "world"),
    "2x2, base in the node": (4, 2, "node", "world"),
    "2x2, adapters in the node too": (4, 2, "node", "node"),
    "4 ranks, base replicated": (4, 1, "replicate", "world"),
    "2 ranks, base replicated": (2, 1, 1, "world"),
}


def train_on(layout: tuple[int, int, Any, str], config: Path, *overrides: str) -> list[dict[str, Any]]:
    world_size, nodes, base, adapter = layout
    name = f"run-{world_size}-{nodes}-{base}-{adapter}-{abs(hash(overrides))}"
    resolved = load_config(
        config,
        [
            f"parallel.base={base}",
            f"parallel.adapter={adapter}",
            f"run.name={name}",
            f"train.micro_batch={max(1, 6 // world_size)}",  # two or three micro-batches a rank, of 12 rows
            *overrides,
        ],
    )
    run_ranks(world_size, run_training, resolved, nodes=nodes)
    folder = Path(resolved.run.dir) / name
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics[-1]["adapter"] = load_file(folder / "adapter" / "adapter_model.safetensors")
    return metrics


def losses(metrics: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in metrics if "loss" in row], dtype=torch.float64)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llama_nf4: Path) -> Path:
    return tiny_models.make_config(tmp_path_factory.mktemp("equal"), tiny_llama_nf4, train__steps=6)


@pytest.fixture(scope="module")
def single(config: Path) -> list[dict[str, Any]]:
    return train_on(LAYOUTS["1 rank"], config)


SHORT = "train.steps=3"  # enough where the loss need not fall


@pytest.fixture(scope="module")
def short(config: Path) -> list[dict[str, Any]]:
    return train_on(LAYOUTS["1 rank"], config, SHORT)


FAST = ("2x2, base in the node",)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in list(LAYOUTS)[1:]]
)
def test_every_layout_trains_the_same(layout: str, config: Path, single: list[dict[str, Any]]) -> None:
    metrics = train_on(LAYOUTS[layout], config)
    assert len(losses(single)) == 6
    torch.testing.assert_close(losses(metrics), losses(single), rtol=1e-5, atol=0)
    for key in ("eval_loss", "grad_norm"):
        numbers, expected = ([row[key] for row in rows if key in row] for rows in (metrics, single))
        torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected), rtol=1e-4, atol=0)
    assert adapter_difference(single[-1]["adapter"], metrics[-1]["adapter"]) < 1e-5
    assert losses(single)[-1] < 0.97 * losses(single)[0]  # the loss has fallen


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("train.micro_batch=1",),
        ("train.micro_batch=6", "train.checkpointing=none"),
        ("train.checkpointing=2", "parallel.prefetch=0"),
        ("parallel.prefetch=2", "model.attention=eager"),
        ("model.attention=flex",),
        ("parallel.offload=base",),
    ],
)
def test_nothing_else_changes_the_numbers(
    overrides: tuple[str, ...], config: Path, short: list[dict[str, Any]]
) -> None:
    metrics = train_on(LAYOUTS["2 ranks"], config, SHORT, *overrides)
    torch.testing.assert_close(losses(metrics), losses(short), rtol=1e-5, atol=0)
    assert adapter_difference(short[-1]["adapter"], metrics[-1]["adapter"]) < 1e-5


def compiled_graphs(config: Config) -> tuple[int, dict[str, int]]:
    """Train, and return the number of compiled graphs and the reasons for graph breaks."""
    counters = torch._dynamo.utils.counters
    counters.clear()  # this process was forked from one that may have compiled for other tests
    torch._dynamo.reset()
    run_training(config)
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.slow
def test_other_sequence_lengths_recompile_nothing(config: Path, short: list[dict[str, Any]]) -> None:
    overrides = [SHORT, "train.compile=true", "train.checkpointing=2", "train.micro_batch=3", "parallel.base=world"]
    resolved = load_config(config, [*overrides, "run.name=compiled"])
    for graphs, breaks in run_ranks(2, compiled_graphs, resolved):
        # graphs of the evaluation, of the first layer, whose input has no gradient, and of the other layers
        assert (graphs, breaks) == (3, {})
    metrics = (Path(resolved.run.dir) / "compiled" / "metrics.jsonl").read_text().splitlines()
    compiled = losses([json.loads(line) for line in metrics])
    torch.testing.assert_close(compiled, losses(short), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_bf16_agrees_within_its_rounding(config: Path) -> None:
    one, two = (
        losses(train_on(LAYOUTS[layout], config, SHORT, "model.compute_dtype=bf16")) for layout in ("1 rank", "2 ranks")
    )
    torch.testing.assert_close(two, one, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_quantizing_while_loading_equals_loading_the_quantized_folder(
    config: Path, tiny_llama: Path, short: list[dict[str, Any]]
) -> None:
    metrics = train_on(LAYOUTS["3 ranks, uneven shards"], config, SHORT, f"model.base={tiny_llama}")
    torch.testing.assert_close(losses(metrics), losses(short), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [("lora.dora=true",), ("lora.rslora=true", "lora.targets=[q_proj,down_proj]")])
def test_adapter_variants(overrides: tuple[str, ...], config: Path) -> None:
    one, two = (train_on(LAYOUTS[layout], config, SHORT, *overrides) for layout in ("1 rank", "2x2, base in the node"))
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-5, atol=0)
    assert adapter_difference(one[-1]["adapter"], two[-1]["adapter"]) < 1e-5


@pytest.mark.slow
def test_fp16_with_loss_scaling_trains(config: Path) -> None:
    one, two = (
        train_on(LAYOUTS[layout], config, "model.compute_dtype=fp16", "train.steps=10")
        for layout in ("1 rank", "2 ranks")
    )
    taken = torch.tensor([not row["skipped"] for row in one if "loss" in row])
    assert taken.sum() >= 7
    assert losses(one)[-1] < 0.95 * losses(one)[0]
    torch.testing.assert_close(losses(two), losses(one), rtol=5e-3, atol=0)
