"""The check that all layouts train the same: their losses agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qlora_dist.bench.bench_result import LayoutResult, LossComparison
from qlora_dist.errors import UserError
from qlora_dist.report.run_files import RunFiles

LOSS_TOLERANCES = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
"""Relative tolerance between the losses of two layouts by compute type, because layouts sum in different orders.

In fp32 the loss of each step must agree. In 16 bit only the mean over all trained tokens must. There, kernels round
differently for other numbers of threads, and Adam's first updates magnify that. Single steps of correct runs then
differ by a thousandth.
"""


def step_losses(run: RunFiles) -> list[float]:
    """Return the loss of each step.

    Raises:
        UserError: a loss is not finite.
    """
    losses = [row["loss"] for row in run.steps]
    if None in losses:
        raise UserError(f"{run.name}: the loss of step {losses.index(None) + 1} was not finite; lower optim.lr")
    return losses


def compare_losses(reference: str, compute_dtype: str, layouts: Sequence[LayoutResult]) -> LossComparison:
    """Compare the losses of all layouts with the reference."""
    by: Literal["step", "mean"] = "step" if compute_dtype == "fp32" else "mean"
    tolerance, largest = LOSS_TOLERANCES[compute_dtype], max(figures.loss_difference(by) for figures in layouts)
    return LossComparison(
        reference=reference, by=by, tolerance=tolerance, largest_difference=largest, agree=largest <= tolerance
    )


def largest_step_difference(run: RunFiles, reference: RunFiles) -> float:
    return max(abs(a - b) / b for a, b in zip(step_losses(run), step_losses(reference), strict=True))


def mean_loss_difference(run: RunFiles, reference: RunFiles) -> float:
    """Return the relative difference of the mean loss over all trained tokens.

    The weights of the steps are the reference's, because all runs train the same tokens in each step.
    """
    tokens: list[int] = [row["trained_tokens"] for row in reference.steps]
    own, other = (sum(a * b for a, b in zip(step_losses(r), tokens, strict=True)) for r in (run, reference))
    return abs(own - other) / other
