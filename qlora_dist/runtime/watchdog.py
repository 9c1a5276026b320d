"""A rank that dies or stalls ends the run, and the run says which.

A thread of each rank publishes how far its main thread is (`record_heartbeat`). A rank whose main thread gets on no more, or whose
collective fails, looks at what the others have published, and the first to find a reason writes it down for all. They
say it in one line and end at once: a process that waits in a collective ends in no other way.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import NoReturn, TypeVar

import torch.distributed as dist

from qlora_dist.errors import UserError
from qlora_dist.runtime.diagnosis import (
    Diagnosis,
    RankStatus,
    diagnose,
    diagnose_exception,
    diagnose_exited_ranks,
    diagnose_lost_store,
    diagnose_user_error,
    unknown_status,
)
from qlora_dist.runtime.environment import RankInfo, agent_hosts_store
from qlora_dist.runtime.heartbeat import last_heartbeat, record_heartbeat
from qlora_dist.runtime.process_exit import delay_exit_for_peers

_T = TypeVar("_T")
_STORE_TIMEOUT_S = 5.0
"""The store has no timeout of its own for a request whose answer gets lost."""
_MAX_EXIT_S = 30.0


@contextmanager
def watchdog(store: dist.Store, ranks: RankInfo, timeout_s: float) -> Iterator[None]:
    """Watch this rank and the others.

    An error of this rank's own passes through, and ends the other ranks. One that is only the echo of another rank's
    end does not: the process ends here, with a line about that rank.

    Args:
        store: where the ranks have met.
        ranks: this one among all; nothing happens in a world of one.
        timeout_s: without a beat.
    """
    if ranks.world_size == 1:
        yield
        return
    record_heartbeat(0, "starting")
    watch = _Watchdog(store, ranks, timeout_s)
    try:
        yield
    except BaseException as error:
        watch.failed(error)
        raise
    watch.finish()


class _Watchdog:
    def __init__(self, store: dist.Store, ranks: RankInfo, timeout_s: float) -> None:
        # a connection of its own: requests on one connection wait for each other, and some of the ranks' wait long
        self._store = dist.PrefixStore("watchdog", store).clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        self._ranks, self._timeout_s = ranks, timeout_s
        self._keeps_store = ranks.rank == 0 and not agent_hosts_store()
        self._status_keys = [f"sign/{rank}" for rank in range(ranks.world_size)]
        first = ranks.rank - ranks.local_rank
        self._node_ranks = range(first, first + ranks.local_world_size)
        self._tick_s = min(1.0, timeout_s / 10)
        self._sample_s = min(10.0, timeout_s / 2)  # between two looks at the others
        self._main = threading.get_ident()
        self._tick, self._count, self._idle_s = 0, -1, 0.0
        self._exit_reason: str | None = None
        self._failing = False
        self._finished = threading.Event()
        self._exit_lock = threading.Lock()
        self._publish()
        self._node_statuses: list[RankStatus] = []
        """The first signs of this node's ranks: where their processes are."""
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        unanswered_s = failing_s = 0.0
        sample: tuple[float, list[RankStatus]] | None = None
        last = time.monotonic()
        while not self._finished.wait(self._tick_s):
            # ticks are counted, not the clock: where all ranks are suspended and go on, nothing has been too slow
            passed_s = min(time.monotonic() - last, 2 * self._tick_s)
            last = time.monotonic()
            now = last_heartbeat()
            self._count, self._idle_s = now.number, self._idle_s + passed_s if now.number == self._count else 0.0
            failing_s += passed_s if self._failing else 0.0
            if failing_s > _MAX_EXIT_S:  # the error has been told, and something holds up the end
                os._exit(1)
            limit_s = self._limit_s() + 0.01 * self._ranks.rank  # not all look at all at the same moment
            verdict: Diagnosis | None = None
            try:
                verdict = _call_store(self._exchange)
                unanswered_s = 0.0
                if verdict is None and self._idle_s < limit_s - self._sample_s:
                    sample = None
                elif verdict is None and (sample is None or self._idle_s >= max(limit_s, sample[0] + self._sample_s)):
                    signs = _call_store(self._look)
                    verdict = self._publish_diagnosis(diagnose(sample[1], signs)) if sample is not None else None
                    sample = self._idle_s, signs
            except (RuntimeError, TimeoutError):
                unanswered_s += passed_s
                verdict = self._diagnose_dead_node_rank()
                if unanswered_s > self._timeout_s:
                    verdict = verdict or diagnose_lost_store(self._sign())
            if verdict is not None and not self._failing and not self._finished.is_set():
                self._end(verdict)

    def _exchange(self) -> Diagnosis | None:
        self._publish()
        if not self._node_statuses and self._store.check(
            keys := [self._status_keys[rank] for rank in self._node_ranks]
        ):
            self._node_statuses = [RankStatus.from_json(text) for text in self._store.multi_get(keys)]
        return self._read_diagnosis()

    def _publish(self) -> None:
        self._tick += 1
        self._store.set(self._status_keys[self._ranks.rank], self._sign().to_json())

    def _sign(self) -> RankStatus:
        now = last_heartbeat()
        waiting = _is_in_collective(sys._current_frames().get(self._main))
        return RankStatus(
            self._ranks.rank, self._tick, now.step, now.phase, self._idle_s, self._limit_s(), waiting, self._exit_reason
        )

    def _limit_s(self) -> float:
        return self._timeout_s * last_heartbeat().timeout_factor

    # --- the main thread ----------------------------------------------------------------------------------------------

    def failed(self, error: BaseException) -> None:
        """Returns if the error is this rank's own, and the first."""
        self._failing = True
        try:
            own = self._own(error)
            verdict = self._find_cause() if _is_communication_error(error) else None
            if verdict is None and own is not None:
                verdict = _call_store(lambda: self._publish_diagnosis(own))
                if verdict != own:
                    _say(f"[rank {self._ranks.rank}] failed as well: {type(error).__name__}: {error}")
        except (RuntimeError, TimeoutError):  # no store any more
            verdict = own
        if verdict is not None and verdict != own:
            self._end(verdict)
        self._leave_store(_STORE_TIMEOUT_S)

    def _own(self, error: BaseException) -> Diagnosis | None:
        """What the others are to end with; None: they find the same by themselves."""
        if isinstance(error, UserError):
            if error.local_only:
                return diagnose_user_error(self._sign(), str(error))
            self._exit_reason = str(error)
        elif isinstance(error, Exception):
            return diagnose_exception(self._sign(), error)
        else:
            self._exit_reason = (
                "" if isinstance(error, SystemExit) and not error.code else f"ended by {type(error).__name__}"
            )
        _call_store(self._publish)
        return None

    def _find_cause(self) -> Diagnosis | None:
        """Why a collective has failed: somebody has said so, or died without a word; None: nobody has."""
        time.sleep(min(2.0, 0.01 * self._ranks.rank))  # one of many finds it out, and spares the others a look at all
        try:
            _call_store(self._publish)
            before = _call_store(self._look)
            end = time.monotonic() + 3 * self._tick_s
            while True:
                verdict = _call_store(self._read_diagnosis) or _call_store(
                    lambda: self._publish_diagnosis(diagnose_exited_ranks(before))
                )
                if verdict is not None:
                    return verdict
                if time.monotonic() > end:
                    return _call_store(lambda: self._publish_diagnosis(diagnose(before, self._look())))
                time.sleep(0.1)
        except (RuntimeError, TimeoutError):
            return self._diagnose_dead_node_rank() or diagnose_lost_store(self._sign())

    def finish(self) -> None:
        """The run is done."""
        self._exit_reason = ""
        with contextlib.suppress(RuntimeError, TimeoutError):
            _call_store(self._publish)
        if not self._keeps_store:  # which may be gone as soon as the last has left
            self._finished.set()
        self._leave_store(2 * self._timeout_s)
        self._finished.set()
        self._thread.join(_STORE_TIMEOUT_S)

    # --- both ---------------------------------------------------------------------------------------------------------

    def _look(self) -> list[RankStatus]:
        if self._store.check(self._status_keys):
            return [RankStatus.from_json(text) for text in self._store.multi_get(self._status_keys)]
        published = [self._store.check([key]) for key in self._status_keys]
        return [
            RankStatus.from_json(self._store.get(self._status_keys[rank])) if given else unknown_status(rank)
            for rank, given in enumerate(published)
        ]

    def _diagnose_dead_node_rank(self) -> Diagnosis | None:
        """What can be found out without the store; the dead was as far as this rank, give or take a step."""
        own = self._sign()
        return diagnose_exited_ranks([replace(sign, step=own.step, phase=own.phase) for sign in self._node_statuses])

    def _read_diagnosis(self) -> Diagnosis | None:
        return Diagnosis.from_json(self._store.get("end")) if self._store.check(["end"]) else None

    def _publish_diagnosis(self, verdict: Diagnosis | None) -> Diagnosis | None:
        """Make it all ranks' verdict, unless there is one: that is returned then."""
        if verdict is None:
            return None
        return Diagnosis.from_json(self._store.compare_set("end", "", verdict.to_json()))

    def _end(self, verdict: Diagnosis) -> NoReturn:
        with self._exit_lock:  # thread or main thread, not both
            rank = self._ranks.rank
            others = [r for r in self._node_ranks if r not in verdict.ranks]
            if rank == (others or self._node_ranks)[0]:
                _say(verdict.sentence)
            if rank in verdict.ranks and verdict.is_stuck:
                stack = traceback.format_stack(sys._current_frames()[self._main])
                _say(f"[rank {rank}] is here:\n{''.join(stack).rstrip()}")
            self._leave_store(_STORE_TIMEOUT_S, dead_ranks=0 if verdict.is_stuck else len(verdict.ranks))
            with contextlib.suppress(OSError):
                if sys.stdout.isatty():
                    sys.stdout.write("\x1b[?25h")  # a progress bar has hidden the cursor
                sys.stdout.flush()
            delay_exit_for_peers()
            os._exit(verdict.exit_code)

    def _leave_store(self, timeout_s: float, dead_ranks: int = 0) -> None:
        """Whoever keeps the store leaves last, so that nobody takes its end for a failure."""
        end = time.monotonic() + timeout_s
        with contextlib.suppress(RuntimeError, TimeoutError):
            left = _call_store(lambda: self._store.add("goodbye", 1))
            while self._keeps_store and left < self._ranks.world_size - dead_ranks and time.monotonic() < end:
                time.sleep(0.05)
                left = _call_store(lambda: self._store.add("goodbye", 0))


def _call_store(request: Callable[[], _T]) -> _T:
    """What the store answers.

    Raises:
        TimeoutError: nothing, for seconds.
        RuntimeError: it is not there.
    """
    answers: list[_T] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            answers.append(request())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(_STORE_TIMEOUT_S)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError("the store does not answer")
    return answers[0]


def _is_communication_error(error: BaseException) -> bool:
    """Whether an error may be another rank's doing: it comes from torch's communication."""
    if isinstance(error, UserError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or re.search(r"\bgloo\b|\bNCCL", str(error)) is not None


def _is_in_collective(frame: FrameType | None) -> bool:
    files: list[str] = []
    while frame is not None and len(files) < 3:
        files.append(frame.f_code.co_filename.replace(os.sep, "/"))
        frame = frame.f_back
    return any("torch/distributed/" in file for file in files)


def _say(text: str) -> None:
    sys.stderr.write(f"qlora-dist: {text}\n")
    sys.stderr.flush()
