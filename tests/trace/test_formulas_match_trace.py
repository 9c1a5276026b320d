"""If this fails, formulas and code differ, because one of them or torch's FSDP2 has changed.

`benchmarks/plan_grid.py` compares them for more models and settings, and prints the error of each phase.
"""

from __future__ import annotations

from typing import Any

import pytest

from qlora_dist.config.schema import Config
from qlora_dist.plan.memory_estimate import estimate_memory
from qlora_dist.plan.model_config import read_model_config
from qlora_dist.plan.run_spec import make_run_spec
from qlora_dist.plan.step_traffic import step_traffic
from qlora_dist.trace.trace_step import StepTrace, trace_step
from tests.helpers.ranks import run_ranks

CASES: list[tuple[str, int, int, dict[str, dict[str, Any]]]] = [
    ("llama-3.1-405b", 16, 2, {"lora": {"dropout": 0.05}}),
    (
        "llama-3.1-8b",
        16,
        2,
        {
            "parallel": {"base": "world", "prefetch": 0},
            "model": {"embeddings": "4bit"},
            "data": {"seq_len": 16384},
            "optim": {"name": "adamw-8bit"},
        },
    ),
    ("smollm2-135m", 1, 1, {"train": {"checkpointing": "none", "micro_batch": 2}}),
    ("llama-3.2-1b", 4, 1, {"model": {"add_tokens": [f"<{n}>" for n in range(64)]}, "parallel": {"base": "world"}}),
    # soft-capped attention without checkpointing: a layer's backward is the peak
    (
        "gemma-2-2b",
        4,
        2,
        {"parallel": {"adapter": "node"}, "train": {"checkpointing": "none"}, "data": {"packing": "none"}},
    ),
]


def configuration(world_size: int, settings: dict[str, dict[str, Any]]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "model": {"base": "model"},
        "lora": {"dropout": 0.0},
        "data": {"train": ["data.jsonl"]},
        "optim": {"name": "adamw"},
        "train": {"micro_batch": 1},
    }
    tree = {section: tree.get(section, {}) | settings.get(section, {}) for section in {*tree, *settings}}
    tree["train"]["global_batch"] = world_size * tree["train"]["micro_batch"]
    return Config.model_validate(tree)


def trace_all() -> list[StepTrace]:
    """Trace all cases in one process, because the first trace of a process takes some seconds more."""
    return [
        trace_step(configuration(world_size, settings), read_model_config(model), world_size, nodes)
        for model, world_size, nodes, settings in CASES
    ]


@pytest.mark.slow
def test_formulas_match_the_trace() -> None:
    (traces,) = run_ranks(1, trace_all)
    for (model, world_size, nodes, settings), traced in zip(CASES, traces, strict=True):
        run = make_run_spec(configuration(world_size, settings), read_model_config(model), world_size, nodes)
        planned = estimate_memory(run)
        assert planned.static_bytes == traced.static_bytes, model
        assert planned.weights_bytes == traced.weights_bytes, model
        peak = 0.06 if max(traced.phases, key=traced.phases.__getitem__) == "layer_backward" else 0.03
        assert planned.peak_bytes == pytest.approx(traced.peak_bytes, rel=peak), model
        traffic = step_traffic(run.model.units, run.shard_counts, run.accumulation, run.compute_bytes)
        assert traffic == pytest.approx(traced.traffic, rel=1e-3), model
