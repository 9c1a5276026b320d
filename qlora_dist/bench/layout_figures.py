"""The figures of a comparison from the files of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from qlora_dist.bench.bench_layouts import BenchCase
from qlora_dist.bench.bench_result import BenchMachine, LayoutResult, Spread
from qlora_dist.bench.compare_losses import largest_step_difference, mean_loss_difference, step_losses
from qlora_dist.plan.calibration_file import load_calibration
from qlora_dist.report.run_files import RunFiles


def summarize_layout(case: BenchCase, runs: Sequence[RunFiles], warm_up: int, reference: RunFiles) -> LayoutResult:
    """Return the figures of a layout.

    Args:
        case: the layout and its number of ranks.
        runs: repeats of the layout. The last step of the first one was profiled, and is not timed.
        warm_up: number of first steps of each run that are not timed.
        reference: run with whose losses these are compared.
    """
    timed = [row for number, run in enumerate(runs) for row in run.steps[warm_up : -1 if number == 0 else None]]
    last, summaries = runs[-1].steps[-1], [run.summary for run in runs]
    step_s = _spread([row["step_s"] for row in timed])
    shares = summaries[0]["step_shares"]
    return LayoutResult(
        layout=case.layout,
        ranks=case.ranks,
        threads_per_rank=runs[0].process["machine"]["threads"],
        nodes=[nodes for run in runs if (nodes := run.process["nodes"]) is not None],
        overrides=case.overrides,
        repeats=len(runs),
        timed_steps=len(timed),
        step_s=step_s,
        tokens_per_s=_spread([row["tokens"] / row["step_s"] for row in timed]),
        trained_tokens_per_s=_spread([row["trained_tokens"] / row["step_s"] for row in timed]),
        positions_per_s=_spread([row["positions"] / row["step_s"] for row in timed]),
        step_shares=shares,
        step_split_s={kind: share * step_s.median for kind, share in shares.items()},
        static_bytes=summaries[0]["static_bytes"],
        peak_bytes=[max(ranks) for ranks in zip(*(summary["peak_bytes"] for summary in summaries), strict=True)],
        received_bytes_per_step=summaries[0]["comm_bytes_per_step"],
        paged_bytes_per_step=_paged_bytes(last),
        read_bytes=summaries[0]["read_bytes"],
        load_s=_spread([summary["load_s"] for summary in summaries]),
        losses=step_losses(runs[0]),
        loss_difference_of_steps=max(largest_step_difference(run, reference) for run in runs),
        loss_difference_of_mean=max(mean_loss_difference(run, reference) for run in runs),
    )


def bench_machine_of_run(run: RunFiles, date: str) -> BenchMachine:
    """Return the machine of a run's rank 0, which may differ from this one."""
    fields = {key: value for key, value in run.process["machine"].items() if key != "threads"}
    return BenchMachine(date=date, links_bytes_per_s=_links() if fields["device"] == "cpu" else {}, **fields)


def _links() -> dict[str, float]:
    measured = load_calibration().devices.get("cpu")
    if measured is None:
        return {}
    links = {"inside a node": measured.inside_bytes, "between nodes": measured.between_bytes}
    return {name: speed for name, speed in links.items() if speed}


def _paged_bytes(row: dict[str, Any]) -> dict[str, int]:
    base, optimizer = row.get("base_paging") or {}, row.get("paging") or {}
    return {"base": base.get("bytes_in", 0), "optimizer": optimizer.get("bytes_in", 0) + optimizer.get("bytes_out", 0)}


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), least=min(values), most=max(values))
