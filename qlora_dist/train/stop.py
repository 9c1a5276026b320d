"""Being asked to stop: by a signal, by a file in the run's folder, by the clock. No torch: handlers are to be there
before the minute that its import and the model's loading take.
"""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType

SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1, "SIGUSR2": signal.SIGUSR2, "SIGINT": signal.SIGINT}
REASONS = (*SIGNALS, "STOP", "max_time")
"""Why a run stops before its last step, in the order of the flags."""
BY_HAND = ("SIGINT", "STOP")
"""Those of them after which nobody should start the run again by himself."""
STOP_FILE, SAVE_FILE = "STOP", "SAVE"

_received: dict[str, int] = {}
_started = time.monotonic()


def listen() -> None:
    """Take note of signals from here on, and go on. The second SIGINT ends the process at once.

    The others may come as often as they like: SLURM under torchrun sends SIGTERM twice, job scripts repeat theirs.
    """
    for number in SIGNALS.values():
        signal.signal(number, _note)
    atexit.register(_listen_no_more)


def _listen_no_more() -> None:
    """While Python ends, it gives signals their first meaning back: one that comes late would kill a process that has
    saved, and its launcher then those that are still at it.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(SIGNALS[name], signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    _received[name] = _received.get(name, 0) + 1
    if name == "SIGINT" and _received[name] == 2:
        os._exit(128 + number)


class Requests:
    """What this rank was asked for, step by step. Files and clock are rank 0's to look at."""

    def __init__(self, run: Path, is_first: bool, max_time: timedelta | None) -> None:
        self._run, self._is_first = run, is_first
        self._max_time_s = None if max_time is None else max_time.total_seconds()
        self._longest_step_s = 0.0

    def flags(self, step_s: float, saving_s: float) -> list[float]:
        """1 for each of REASONS that holds, and for a wish to save: to be summed over ranks along with the loss.

        Args:
            step_s: what the last step took.
            saving_s: what the last checkpoint took.
        """
        self._longest_step_s = max(self._longest_step_s, step_s)
        signals = [float(name in _received) for name in SIGNALS]
        if not self._is_first:
            return [*signals, 0.0, 0.0, 0.0]
        # the step that is being done, one more that notices, and the checkpoint
        ahead_s = time.monotonic() - _started + 2 * self._longest_step_s + saving_s
        late = self._max_time_s is not None and ahead_s > self._max_time_s
        return [*signals, self._there(STOP_FILE), float(late), self._there(SAVE_FILE)]

    def answered(self, sums: Sequence[float]) -> None:
        """Take the files away that all ranks know of."""
        asked = {STOP_FILE: sums[REASONS.index(STOP_FILE)] > 0, SAVE_FILE: wants_save(sums)}
        for name, known in asked.items():
            if known and self._is_first:
                (self._run / name).unlink(missing_ok=True)

    def _there(self, name: str) -> float:
        return float((self._run / name).exists())


def reason(sums: Sequence[float]) -> str | None:
    """Why to stop, from the flags' sums over the ranks."""
    return next((name for name, count in zip(REASONS, sums, strict=False) if count), None)


def wants_save(sums: Sequence[float]) -> bool:
    """Whether a checkpoint was asked for."""
    return sums[len(REASONS)] > 0
