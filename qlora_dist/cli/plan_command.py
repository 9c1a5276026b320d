"""Command `qlora-dist plan`: print a plan."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import typer
from rich.console import Console

from qlora_dist.errors import UserError
from qlora_dist.plan.model_config import read_model_config
from qlora_dist.plan.plan_args import PlanArgs, config_to_plan, plan_from_args
from qlora_dist.plan.training_plan import TrainingPlan


def run_plan(args: PlanArgs, *, search: bool, plot: Path | None, as_json: bool, with_trace: bool = False) -> None:
    """Print a plan, or the configuration found by a search."""
    if search:
        from qlora_dist.plan.plan_search import print_fastest_plan

        print_fastest_plan(args, as_json=as_json)
        return
    planned = plan_from_args(args)
    if plot is not None:
        from qlora_dist.report.plot_plan import plot_plan

        plot_plan(planned, _plans_by_nodes(args), plot)
    traced = None
    if with_trace:
        from qlora_dist.trace import compare_trace

        config = config_to_plan(args)
        traced = compare_trace.trace_plan(planned, config, read_model_config(config.model.base))
    if as_json:
        trace_json = {"trace": compare_trace.trace_as_json(traced)} if traced is not None else {}
        typer.echo(json.dumps(planned.as_json() | trace_json, indent=2))
        return
    from qlora_dist.plan.print_plan import print_plan

    print_plan(planned, config_to_plan(args).model.base, Console())
    if traced is not None:
        compare_trace.print_trace_comparison(planned, traced, Console())


def _plans_by_nodes(args: PlanArgs) -> list[tuple[int, TrainingPlan]]:
    """Return plans on more and on fewer nodes, where the configuration allows it."""
    plans = []
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        with contextlib.suppress(UserError):
            plans.append((nodes, plan_from_args(replace(args, nodes=nodes))))
    return plans
