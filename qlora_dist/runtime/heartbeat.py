"""Heartbeat of this process, read by the watchdog. It is module state, because there is exactly one main thread."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

RunPhase = Literal[
    "starting",
    "loading",
    "saving a checkpoint",
    "evaluating",
    "reading data",
    "training",
    "completing the last checkpoint",
    "saving the adapter",
    "done",
]
"""Phases in the order in which a run passes them after the same number of steps."""
RUN_PHASES: tuple[str, ...] = get_args(RunPhase)


class Heartbeat(NamedTuple):
    """Position of the main thread at its last report."""

    sequence_number: int = 0
    """Number of reports so far."""
    step: int = 0
    """Optimizer steps that are done."""
    phase: RunPhase = "starting"
    timeout_factor: float = 1.0
    """Factor on `train.timeout` for the time until the next report."""


_last = Heartbeat()


def record_heartbeat(
    step: int | None = None, phase: RunPhase | None = None, timeout_factor: float | None = None
) -> None:
    """Report progress. The main thread must call this more often than every `train.timeout` seconds.

    Args:
        step: optimizer steps that are done; None leaves it unchanged.
        phase: phase that begins now; None leaves it unchanged.
        timeout_factor: factor on the timeout until the next call. None: 1 for a new phase, and unchanged otherwise.
    """
    global _last
    before = _last
    if timeout_factor is None:
        timeout_factor = before.timeout_factor if phase is None else 1.0
    _last = Heartbeat(
        before.sequence_number + 1, before.step if step is None else step, phase or before.phase, timeout_factor
    )


def last_heartbeat() -> Heartbeat:
    return _last
