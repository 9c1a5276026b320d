"""How far this process is, for the watchdog. One for the process, as its main thread is: no function hands it on."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Phase = Literal[
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
PHASES: tuple[str, ...] = get_args(Phase)


class Beat(NamedTuple):
    """Where the main thread was when it last said so."""

    number: int = 0
    """How often it has."""
    step: int = 0
    """Optimizer steps that are done."""
    phase: Phase = "starting"
    patience: float = 1.0
    """Times `train.timeout` that may pass before the next."""


_now = Beat()


def beat(step: int | None = None, phase: Phase | None = None, patience: float | None = None) -> None:
    """Say that there is progress. To be called by the main thread, more often than every `train.timeout` seconds.

    Args:
        step: optimizer steps that are done; None: as before.
        phase: what begins now; None: it goes on.
        patience: how many times the timeout it may take until the next call; None: once for a new phase, else as
            before.
    """
    global _now
    before = _now
    if patience is None:
        patience = before.patience if phase is None else 1.0
    _now = Beat(before.number + 1, before.step if step is None else step, phase or before.phase, patience)


def last_beat() -> Beat:
    """The last one."""
    return _now
