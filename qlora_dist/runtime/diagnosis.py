"""Diagnosis of a run without progress, from the statuses that its ranks publish. It uses no store, thread or clock."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from qlora_dist.runtime.heartbeat import RUN_PHASES

ProcessState = Literal["gone", "stopped", "unknown"]


@cache
def _pid_namespace() -> str:
    """Return the namespace in which a process number is unique. Containers of one machine have separate numbers."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """Status of a rank, published every second by its watchdog thread."""

    rank: int
    tick: int
    """Number of publications so far."""
    step: int
    phase: str
    idle_s: float
    """Seconds since the last heartbeat of the main thread."""
    limit_s: float
    """Seconds without a heartbeat after which the rank counts as stuck."""
    in_collective: bool
    """True if the main thread is inside torch.distributed."""
    exit_reason: str | None = None
    """Reason why the rank exits; empty if it is done, None while it runs."""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    pid_namespace: str = field(default_factory=_pid_namespace)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> RankStatus:
        return cls(**json.loads(text))

    @property
    def rank_label(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def progress_label(self) -> str:
        return f"{f'after step {self.step}' if self.step else 'before the first step'} ({self.phase})"

    @property
    def position(self) -> tuple[int, int]:
        """Step and index of the phase. A rank with a larger position has done more."""
        return self.step, RUN_PHASES.index(self.phase)


@dataclass(frozen=True)
class Diagnosis:
    """Reason why the run ends on all ranks."""

    message: str
    ranks: list[int]
    """Ranks that cause the end."""
    is_stuck: bool = False
    """True if these ranks still run, so that their stacks show the cause."""
    exit_code: int = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Diagnosis:
        return cls(**json.loads(text))


def unknown_status(rank: int) -> RankStatus:
    """Return a placeholder for a rank that has not published a status yet."""
    return RankStatus(
        rank=rank,
        tick=0,
        step=0,
        phase=RUN_PHASES[0],
        idle_s=0.0,
        limit_s=0.0,
        in_collective=False,
        host="an unknown host",
        pid_namespace="",
    )


def process_state(status: RankStatus) -> ProcessState:
    """Return the state of a rank's process; unknown if it runs, or if it cannot be seen from this process."""
    if not status.pid_namespace or status.pid_namespace != _pid_namespace():
        return "unknown"
    try:
        state = Path(f"/proc/{status.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    states: dict[str, ProcessState] = {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}
    return states.get(state, "unknown")


def diagnose_exception(status: RankStatus, error: BaseException) -> Diagnosis:
    """Return the diagnosis for a rank that has raised an error."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    summary = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return Diagnosis(
        f"{status.rank_label} failed {status.progress_label}: {summary}; its traceback is in its output", [status.rank]
    )


def diagnose_user_error(status: RankStatus, message: str) -> Diagnosis:
    """Return the diagnosis for a user's error that only this rank has detected."""
    return Diagnosis(f"{status.rank_label} has stopped: {message}", [status.rank], exit_code=2)


def diagnose_lost_store(own: RankStatus) -> Diagnosis:
    """Return the diagnosis for a store that no longer answers."""
    return Diagnosis(
        f"rank 0 or its launcher went away {own.progress_label}: the store that they keep is gone; look at the end of "
        "that node's output",
        [0],
    )


def diagnose_exited_ranks(
    statuses: Sequence[RankStatus], state: Callable[[RankStatus], ProcessState] = process_state
) -> Diagnosis | None:
    """Return the diagnosis for ranks that have failed or whose process is gone; None if there are none."""
    for status in statuses:
        if status.exit_reason:
            return diagnose_user_error(status, status.exit_reason)
    gone = [status for status in statuses if status.exit_reason is None and state(status) == "gone"]
    return _diagnose_gone(gone, statuses)


def diagnose(
    before: Sequence[RankStatus],
    after: Sequence[RankStatus],
    state: Callable[[RankStatus], ProcessState] = process_state,
) -> Diagnosis | None:
    """Return the reason why the run makes no progress; None if the slowest ranks still work within their limit.

    The statuses in `after` were read seconds after `before`, so that each rank has had time to publish again.
    """
    if (diagnosis := diagnose_exited_ranks(after, state)) is not None:
        return diagnosis
    unpublished = [
        new for old, new in zip(before, after, strict=True) if new.tick == old.tick and new.exit_reason is None
    ]
    stopped = [status for status in unpublished if state(status) == "stopped"]
    if stopped:
        return Diagnosis(
            f"{_rank_labels(stopped)} was stopped by a signal {_most_advanced(after).progress_label}; continue it "
            "(SIGCONT), or kill it and start the run again",
            [status.rank for status in stopped],
        )
    return _diagnose_gone(unpublished, after) or _diagnose_stuck(after)


def _diagnose_gone(gone: Sequence[RankStatus], statuses: Sequence[RankStatus]) -> Diagnosis | None:
    if not gone:
        return None
    return Diagnosis(
        f"{_rank_labels(gone)} went away {_most_advanced(statuses).progress_label}; look at the end of its node's "
        "output: without a traceback there, the system has killed it, most often because memory ran out",
        [status.rank for status in gone],
    )


def _diagnose_stuck(statuses: Sequence[RankStatus]) -> Diagnosis | None:
    running = [status for status in statuses if status.exit_reason is None]
    slowest = [status for status in running if status.position == min(other.position for other in running)]
    if not slowest or any(status.idle_s < status.limit_s for status in slowest):
        return None
    slowest = [status for status in slowest if not status.in_collective] or slowest  # a rank in a collective only waits
    idle_s = min(status.idle_s for status in slowest)
    return Diagnosis(
        f"{_rank_labels(slowest)} has made no progress for {idle_s:.0f} s {slowest[0].progress_label}; its stack is in "
        "its output; raise train.timeout if it only takes that long",
        [status.rank for status in slowest],
        is_stuck=True,
    )


def _most_advanced(statuses: Sequence[RankStatus]) -> RankStatus:
    """Return the status with the largest position.

    Ranks advance in lockstep, so a dead rank had reached the same step as the live ones. Only its last status is older.
    """
    return max(statuses, key=lambda status: status.position)


def _rank_labels(statuses: Sequence[RankStatus]) -> str:
    return statuses[0].rank_label + (f" (and {len(statuses) - 1} more)" if len(statuses) > 1 else "")
