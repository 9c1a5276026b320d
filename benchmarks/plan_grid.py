"""Compare the planner's formulas (`plan/memory_estimate.py`, `plan/step_traffic.py`) with the trace of a step.

    python benchmarks/plan_grid.py [--only llama-3.1-405b] [--quick] [--json FILE]

For each model, mesh and setting it compares bytes between steps, the peak of each phase, and bytes sent in a step. The
exit code is 1 if static bytes differ at all, sent bytes by more than 0.1 %, or the peak by more than 3 %. The peak's
tolerance is 6 % if a layer's backward is the peak.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_dist.config.schema import Config
from qlora_dist.plan.memory_estimate import estimate_memory
from qlora_dist.plan.model_config import read_model_config
from qlora_dist.plan.run_spec import make_run_spec
from qlora_dist.plan.step_traffic import step_traffic
from qlora_dist.trace.trace_step import trace_step

SHAPES = [(1, 1), (2, 1), (8, 1), (16, 2), (64, 8), (512, 64)]
"""Numbers of ranks and nodes."""
SETTINGS: list[tuple[str, dict[str, dict[str, Any]]]] = [
    ("", {}),
    ("world", {"parallel": {"base": "world"}}),
    ("none", {"train": {"checkpointing": "none"}}),
    ("every 3rd", {"train": {"checkpointing": 3}}),
    ("2 x 4096", {"data": {"seq_len": 4096}, "train": {"micro_batch": 2}}),
    ("16384", {"data": {"seq_len": 16384}}),
    ("512, dropout", {"data": {"seq_len": 512}, "lora": {"dropout": 0.05}}),
    ("accumulation 4", {"train": {"accumulation": 4}}),
    ("4bit embeddings", {"model": {"embeddings": "4bit"}}),
    ("8bit moments, r 64", {"optim": {"name": "adamw-8bit"}, "lora": {"r": 64}}),
    ("prefetch 0, adapter: node", {"parallel": {"prefetch": 0, "adapter": "node"}}),
    ("prefetch 2", {"parallel": {"prefetch": 2}}),
    ("replicate", {"parallel": {"base": "replicate"}}),
    ("fp32", {"model": {"compute_dtype": "fp32"}}),
    ("unpacked", {"data": {"packing": "none"}, "train": {"micro_batch": 4}}),
]
MODELS = [
    "llama-3.1-8b",
    "llama-3.1-405b",
    "llama-2-7b",
    "smollm2-135m",
    "mistral-7b",
    "qwen2.5-7b",
    "qwen3-8b",
    "gemma-2-9b",
]


def configuration(settings: dict[str, dict[str, Any]], world_size: int) -> Config:
    """Return the configuration of a run with r=16 and 2048 tokens, changed by the settings."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"base": "model"},
        "lora": {"r": 16, "dropout": 0.0},
        "data": {"train": ["data.jsonl"], "seq_len": 2048},
        "optim": {"name": "adamw"},
        "train": {"micro_batch": 1},
    }
    for section, values in settings.items():
        tree[section] = tree.get(section, {}) | values
    train = tree["train"]
    train["global_batch"] = world_size * train["micro_batch"] * train.pop("accumulation", 1)
    return Config.model_validate(tree)


def compare(model: str, world_size: int, nodes: int, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return pairs of figures in bytes, first by the formulas, then by the trace."""
    config, model_config = configuration(settings, world_size), read_model_config(model)
    run = make_run_spec(config, model_config, world_size, nodes)
    memory = estimate_memory(run)
    traffic = step_traffic(run.model.units, run.shard_counts, run.accumulation, run.compute_bytes)
    started = time.process_time()
    traced = trace_step(config, model_config, world_size, nodes)
    return {
        "static": (memory.static_bytes, traced.static_bytes),
        "peak": (memory.peak_bytes, traced.peak_bytes),
        "phases": {p: (memory.static_bytes + sum(memory.phases[p].values()), n) for p, n in traced.phases.items()},
        "traffic": (sum(traffic.values()), sum(traced.traffic.values())),
        "cpu_s": time.process_time() - started,
    }


def exceeds_tolerance(comparison: dict[str, Any]) -> bool:
    """Return whether formulas and trace differ by more than the tolerances."""
    phases = comparison["phases"]
    peak_tolerance = 0.06 if max(phases, key=lambda phase: phases[phase][1]) == "layer_backward" else 0.03
    return bool(
        comparison["static"][0] != comparison["static"][1]
        or abs(relative_error(comparison["peak"])) > peak_tolerance
        or abs(relative_error(comparison["traffic"])) > 1e-3
    )


def relative_error(pair: tuple[int, int]) -> float:
    """Return the relative difference of the formula from the trace."""
    return pair[0] / pair[1] - 1 if pair[1] else float(pair[0] != 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="model to compare; may be repeated")
    parser.add_argument("--setting", action="append", help="setting to compare; may be repeated")
    parser.add_argument(
        "--quick", action="store_true", help="use 8 ranks, and two settings besides the first per model"
    )
    parser.add_argument("--json", help="file for all figures")
    args = parser.parse_args()
    cases = []
    for number, model in enumerate(args.only or MODELS):
        for index, (name, settings) in enumerate(SETTINGS):
            if args.setting and name not in args.setting:
                continue
            if args.quick and not args.setting and index not in (0, 1 + number % 14, 1 + (number + 7) % 14):
                continue
            shape = (8, 1) if args.quick else SHAPES[(number + index) % len(SHAPES)]
            cases.append((model, name, settings, shape))
    table = Table(
        "model", "setting", "ranks", "static", "peak GiB", "formula", "forward", "head", "backward", "sent", "s"
    )
    results, bad = [], 0
    for model, name, settings, (world_size, nodes) in cases:
        comparison = compare(model, world_size, nodes, settings)
        results.append({"model": model, "setting": name, "ranks": world_size, "nodes": nodes, **comparison})
        bad += exceeds_tolerance(comparison)
        phases = [
            f"{100 * relative_error(comparison['phases'][phase]):+.2f}"
            for phase in ("layer_forward", "head", "layer_backward")
        ]
        static_error = relative_error(comparison["static"])
        static = "=" if static_error == 0 else f"{100 * static_error:+.3f} %"
        row = [
            model,
            name,
            f"{world_size}/{nodes}",
            static,
            f"{comparison['peak'][1] / 2**30:.3f}",
            f"{100 * relative_error(comparison['peak']):+.2f} %",
        ]
        row += [*phases, f"{100 * relative_error(comparison['traffic']):+.3f} %", f"{comparison['cpu_s']:.0f}"]
        table.add_row(*row, style="red" if exceeds_tolerance(comparison) else None)
        print(*row, "BAD" if exceeds_tolerance(comparison) else "", flush=True, sep=" | ")
    Console(width=150).print(table)
    if args.json:
        Path(args.json).write_text(json.dumps(results))
    print(f"{len(results)} cases, {bad} of them beyond the tolerances")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
