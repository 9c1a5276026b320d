"""`qlora-dist plan --trace`: the formulas' figures beside the figures of a traced step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_dist.config.schema import Config
from qlora_dist.plan.training_plan import TrainingPlan
from qlora_dist.runtime.byte_sizes import format_gib
from qlora_dist.trace.trace_step import StepTrace, trace_step


def trace_plan(plan: TrainingPlan, config: Config, model_config: Mapping[str, Any]) -> StepTrace:
    """Trace a plan's run, with as many moments on the device as in the plan."""
    traced = trace_step(config, model_config, plan.run.shard_counts.world_size, plan.run.nodes)
    resident_bytes = min(plan.memory.static["moments"], traced.moments_bytes)
    paged = traced.moments_bytes - resident_bytes
    return replace(
        traced, moments_bytes=resident_bytes, phases={phase: nbytes - paged for phase, nbytes in traced.phases.items()}
    )


def trace_as_json(traced: StepTrace) -> dict[str, Any]:
    """Return the tree that `plan --json` prints of a trace."""
    return {**asdict(traced), "static_bytes": traced.static_bytes, "peak_bytes": traced.peak_bytes}


def print_trace_comparison(plan: TrainingPlan, traced: StepTrace, console: Console) -> None:
    """Print a table of a plan's and a trace's figures."""
    memory = plan.memory
    rows: list[tuple[str, int, int]] = [("between steps", memory.static_bytes, traced.static_bytes)]
    for phase, nbytes in traced.phases.items():
        rows.append((phase.replace("_", " "), memory.phase_bytes(phase), nbytes))
    rows.append(("peak", memory.peak_bytes, traced.peak_bytes))
    for dim in traced.traffic:
        rows.append((f"received in a step, {dim}", plan.traffic.get(dim, 0), traced.traffic[dim]))
    table = Table("GiB of a rank", title="Formulas, and a step of the code itself", title_justify="left")
    for heading in ("formula", "trace", "difference"):
        table.add_column(heading, justify="right")
    for name, formula, traced_bytes in rows:
        difference = 100 * (formula / traced_bytes - 1) if traced_bytes else 0.0
        table.add_row(name, format_gib(formula), format_gib(traced_bytes), f"{difference:+.2f} %")
    console.print(table)
