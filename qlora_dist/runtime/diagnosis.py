"""Who holds the others up? Judged from what the ranks say of themselves: no store, thread or clock in here."""

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
    """Where a process number means the same process: containers of one machine have numbers of their own."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return ""


@dataclass(frozen=True)
class RankStatus:
    """A rank's sign of life, published every second by a thread of its own."""

    rank: int
    tick: int
    """Grows with every publication."""
    step: int
    phase: str
    idle_s: float
    """Since its main thread's last beat."""
    limit_s: float
    """More than that is too long."""
    waiting: bool
    """Its main thread is inside of torch.distributed."""
    left: str | None = None
    """Why it has ended or is about to: empty, it is done; else the user's mistake."""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    pid_space: str = field(default_factory=_pid_namespace)

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> RankStatus:
        """The inverse."""
        return cls(**json.loads(text))

    @property
    def who(self) -> str:
        """For people."""
        return f"rank {self.rank} on {self.host}"

    @property
    def progress_label(self) -> str:
        """For people."""
        return f"{f'after step {self.step}' if self.step else 'before the first step'} ({self.phase})"

    @property
    def place(self) -> tuple[int, int]:
        """How far it is, for comparisons."""
        return self.step, RUN_PHASES.index(self.phase)


@dataclass(frozen=True)
class Diagnosis:
    """Why the run ends, on all ranks."""

    sentence: str
    ranks: list[int]
    """Those whose doing it is."""
    is_stuck: bool = False
    """They live, and their stacks say where they are."""
    exit_code: int = 1

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Diagnosis:
        """The inverse."""
        return cls(**json.loads(text))


def unknown_status(rank: int) -> RankStatus:
    """In place of a sign that a rank has not given yet."""
    return RankStatus(rank, 0, 0, RUN_PHASES[0], 0.0, 0.0, False, host="an unknown host", pid_space="")


def process_state(status: RankStatus) -> ProcessState:
    """Whether a rank on this machine still runs; unknown also if it does, which doesn't mean that it gets on."""
    if not status.pid_space or status.pid_space != _pid_namespace():
        return "unknown"
    try:
        state = Path(f"/proc/{status.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    states: dict[str, ProcessState] = {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}
    return states.get(state, "unknown")


def diagnose_exception(status: RankStatus, error: BaseException) -> Diagnosis:
    """Of a rank with an error of its own."""
    reason = (str(error).strip().splitlines() or [""])[0]
    what = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return Diagnosis(
        f"{status.who} failed {status.progress_label}: {what}; its traceback is in its output", [status.rank]
    )


def diagnose_user_error(status: RankStatus, message: str) -> Diagnosis:
    """Of a rank that has found a mistake of the user's which the others have not."""
    return Diagnosis(f"{status.who} has stopped: {message}", [status.rank], exit_code=2)


def diagnose_lost_store(status: RankStatus) -> Diagnosis:
    """Nobody answers where the ranks have met. `status` is this rank's own."""
    return Diagnosis(
        f"rank 0 or its launcher went away {status.progress_label}: the store that they keep is gone; look at the end of that "
        "node's output",
        [0],
    )


def diagnose_exited_ranks(
    statuses: Sequence[RankStatus], state: Callable[[RankStatus], ProcessState] = process_state
) -> Diagnosis | None:
    """Whoever has left, or is known to be dead; None: nobody."""
    for sign in statuses:
        if sign.left:
            return diagnose_user_error(sign, sign.left)
    return _diagnose_gone([sign for sign in statuses if sign.left is None and state(sign) == "gone"], statuses)


def diagnose(
    before: Sequence[RankStatus],
    after: Sequence[RankStatus],
    state: Callable[[RankStatus], ProcessState] = process_state,
) -> Diagnosis | None:
    """Why there is no progress.

    Args:
        before: of all ranks.
        after: the same ranks some seconds later, time enough to publish again.
        state: of a rank's process.

    Returns:
        None: those who are behind are at work, and not for too long.
    """
    if (verdict := diagnose_exited_ranks(after, state)) is not None:
        return verdict
    unpublished = [new for old, new in zip(before, after, strict=True) if new.tick == old.tick and new.left is None]
    stopped = [sign for sign in unpublished if state(sign) == "stopped"]
    if stopped:
        return Diagnosis(
            f"{_rank_labels(stopped)} was stopped by a signal {_most_advanced(after).progress_label}; let it go on, or end it, and start "
            "the run again",
            [sign.rank for sign in stopped],
        )
    return _diagnose_gone(unpublished, after) or _diagnose_stuck(after)


def _diagnose_gone(signs: Sequence[RankStatus], everyone: Sequence[RankStatus]) -> Diagnosis | None:
    if not signs:
        return None
    return Diagnosis(
        f"{_rank_labels(signs)} went away {_most_advanced(everyone).progress_label}; look at the end of its node's output: without a "
        "traceback there, the system has killed it, most often for want of memory",
        [sign.rank for sign in signs],
    )


def _diagnose_stuck(statuses: Sequence[RankStatus]) -> Diagnosis | None:
    running = [sign for sign in statuses if sign.left is None]
    slowest = [sign for sign in running if sign.place == min(other.place for other in running)]
    if not slowest or any(sign.idle_s < sign.limit_s for sign in slowest):
        return None
    slowest = [sign for sign in slowest if not sign.waiting] or slowest  # those in a collective wait for the others
    idle_s = min(sign.idle_s for sign in slowest)
    return Diagnosis(
        f"{_rank_labels(slowest)} has made no progress for {idle_s:.0f} s {slowest[0].progress_label}; its stack is in its output; raise "
        "train.timeout if it only takes that long",
        [sign.rank for sign in slowest],
        is_stuck=True,
    )


def _most_advanced(signs: Sequence[RankStatus]) -> RankStatus:
    """Ranks go hand in hand: the dead have been as far as the living are, and no more than their last sign is old."""
    return max(signs, key=lambda sign: sign.place)


def _rank_labels(signs: Sequence[RankStatus]) -> str:
    return signs[0].who + (f" (and {len(signs) - 1} more)" if len(signs) > 1 else "")
