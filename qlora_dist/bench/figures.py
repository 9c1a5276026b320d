"""From the files of runs to figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from qlora_dist.bench.jobs import threads_per_rank
from qlora_dist.bench.layouts import Cell
from qlora_dist.bench.result import LayoutFigures, Losses, Spread
from qlora_dist.errors import UserError
from qlora_dist.report.read import RunFiles

TOLERANCES = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
"""Relative, between the losses of two layouts, by compute type: sums are made in another order."""


def figures(cell: Cell, runs: Sequence[RunFiles], warm_up: int, reference: Sequence[float]) -> LayoutFigures:
    """Of a layout.

    Args:
        cell: which it is.
        runs: its repeats.
        warm_up: steps at the beginning of each that are not timed; the last one, which was profiled, is not either.
        reference: losses of each step, that these are compared with.
    """
    timed = [row for run in runs for row in run.steps[warm_up:-1]]
    last, summaries = runs[-1].steps[-1], [run.summary for run in runs]
    step_s = _spread([row["step_s"] for row in timed])
    kinds = summaries[0]["step_shares"]
    shares = {kind: statistics.fmean(summary["step_shares"][kind] for summary in summaries) for kind in kinds}
    return LayoutFigures(
        layout=cell.layout,
        ranks=cell.ranks,
        threads_per_rank=threads_per_rank(cell.ranks),
        overrides=cell.overrides,
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
        paged_bytes_per_step=_paged(last),
        read_bytes=summaries[0]["read_bytes"],
        load_s=_spread([summary["load_s"] for summary in summaries]),
        losses=losses_of(runs[0]),
        loss_difference=max(_difference(losses_of(run), reference) for run in runs),
    )


def losses_of(run: RunFiles) -> list[float]:
    """Of each step.

    Raises:
        UserError: one was not finite.
    """
    losses = [row["loss"] for row in run.steps]
    if None in losses:
        raise UserError(f"{run.name}: the loss of step {losses.index(None) + 1} was not finite; lower optim.lr")
    return losses


def compare_losses(reference: str, compute_dtype: str, layouts: Sequence[LayoutFigures]) -> Losses:
    """Whether all have trained the same."""
    tolerance, largest = TOLERANCES[compute_dtype], max(figures.loss_difference for figures in layouts)
    return Losses(reference=reference, tolerance=tolerance, largest_difference=largest, agree=largest <= tolerance)


def _difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def _paged(row: dict[str, Any]) -> dict[str, int]:
    base, optimizer = row.get("base_paging") or {}, row.get("paging") or {}
    return {
        "base": base.get("bytes_in", 0),
        "optimizer": optimizer.get("bytes_in", 0) + optimizer.get("bytes_out", 0),
    }


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), least=min(values), most=max(values))
