"""The flags that the ranks sum once per step. No torch, because `stop_requests` uses them before torch is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

STOP_REASONS = {
    "sigterm": "SIGTERM",
    "sigusr1": "SIGUSR1",
    "sigusr2": "SIGUSR2",
    "sigint": "SIGINT",
    "sighup": "SIGHUP",
    "stop_file": "STOP",
    "max_time": "max_time",
}
"""Flags after which a run stops before its last step, with the names that users see. The first one set is reported."""
MANUAL_STOP_REASONS = ("SIGINT", "STOP")
"""Stop reasons given by a person. A scheduler must not restart the run after one of these."""


@dataclass(frozen=True, kw_only=True)
class ControlFlags:
    """Requests and checkpoint status of one rank, or their sums over all ranks.

    On one rank each flag is 0 or 1. A flag with the name of a signal is 1 if the rank received that signal. The sums
    travel in the same all-reduce as the loss and the gradient norm.
    """

    checkpoints_written: int = 0
    """Number of ranks whose file of the current checkpoint is written."""
    checkpoints_failed: int = 0
    """Number of ranks that failed to write their file of the current checkpoint."""
    sigterm: int = 0
    sigusr1: int = 0
    sigusr2: int = 0
    sigint: int = 0
    sighup: int = 0
    stop_file: int = 0
    """1 if rank 0 sees the file STOP in the run's folder."""
    max_time: int = 0
    """1 if rank 0 has no time left for another step within `train.max_time`."""
    save_file: int = 0
    """1 if rank 0 sees the file SAVE in the run's folder."""

    def to_list(self) -> list[float]:
        """Return the flags in the order of the fields, for a tensor."""
        return [float(flag) for flag in dataclasses.astuple(self)]

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> ControlFlags:
        """Return the flags whose sums over all ranks, in the order of the fields, are `sums`."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: int(count) for name, count in zip(names, sums, strict=True)})

    @property
    def stop_reason(self) -> str | None:
        """Reason to stop, by its name for users; None without a request to stop."""
        return next((reason for flag, reason in STOP_REASONS.items() if getattr(self, flag)), None)
