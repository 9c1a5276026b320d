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

    None leaves a value unchanged, except that a new phase sets the factor on the timeout to 1.
    """
    global _last
    if timeout_factor is None:
        timeout_factor = _last.timeout_factor if phase is None else 1.0
    done = _last.step if step is None else step
    _last = Heartbeat(_last.sequence_number + 1, done, phase or _last.phase, timeout_factor)


def last_heartbeat() -> Heartbeat:
    return _last
