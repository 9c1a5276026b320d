"""How far this process is, for the watchdog. One for the process, as its main thread is: no function hands it on."""

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
"""In the order in which they come after the same number of steps."""
RUN_PHASES: tuple[str, ...] = get_args(RunPhase)


class Heartbeat(NamedTuple):
    """Where the main thread was when it last said so."""

    number: int = 0
    """How often it has."""
    step: int = 0
    """Optimizer steps that are done."""
    phase: RunPhase = "starting"
    timeout_factor: float = 1.0
    """Times `train.timeout` that may pass before the next."""


_last = Heartbeat()


def record_heartbeat(
    step: int | None = None, phase: RunPhase | None = None, timeout_factor: float | None = None
) -> None:
    """Say that there is progress. To be called by the main thread, more often than every `train.timeout` seconds.

    Args:
        step: optimizer steps that are done; None: as before.
        phase: what begins now; None: it goes on.
        timeout_factor: how many times the timeout it may take until the next call; None: once for a new phase, else as
            before.
    """
    global _last
    before = _last
    if timeout_factor is None:
        timeout_factor = before.timeout_factor if phase is None else 1.0
    _last = Heartbeat(before.number + 1, before.step if step is None else step, phase or before.phase, timeout_factor)


def last_heartbeat() -> Heartbeat:
    """The last one."""
    return _last
