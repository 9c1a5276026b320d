"""Watchdog that ends the run when a rank dies or stalls, and reports which rank it was.

A thread of each rank publishes the progress of its main thread (`record_heartbeat`). When a rank's main thread stalls,
or a collective fails, it reads the other ranks' statuses. The first rank to reach a diagnosis publishes it to all. Each
rank then exits at once, because a process that waits in a collective cannot be ended in another way.
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

from qlora_dist.errors import UserError, write_stderr
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

_Answer = TypeVar("_Answer")
_STORE_TIMEOUT_S = 5.0
"""Seconds until a request to the store counts as lost. The store itself sets no limit for its answer."""
_MAX_EXIT_S = 30.0
"""Seconds that a rank may take to exit after it has reported its error."""


@contextmanager
def watchdog(store: dist.Store, ranks: RankInfo, timeout_s: float) -> Iterator[None]:
    """Watch this rank and the others. A world of one rank is not watched.

    A rank counts as stuck after `timeout_s` seconds without a heartbeat. An error that began on this rank is re-raised,
    and ends the other ranks. If another rank's exit caused the error, the process exits here with a message about that
    rank.
    """
    if ranks.world_size == 1:
        yield
        return
    record_heartbeat(0, "starting")
    watch = _Watchdog(store, ranks, timeout_s)
    try:
        yield
    except BaseException as error:
        watch.report_failure(error)
        raise
    watch.finish()


class _Watchdog:
    def __init__(self, store: dist.Store, ranks: RankInfo, timeout_s: float) -> None:
        # a separate connection, because requests on one connection wait for each other, and some of the ranks' block
        self._store = dist.PrefixStore("watchdog", store).clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        self._ranks, self._timeout_s = ranks, timeout_s
        self._keeps_store = ranks.rank == 0 and not agent_hosts_store()
        self._status_keys = [f"sign/{rank}" for rank in range(ranks.world_size)]
        first = ranks.rank - ranks.local_rank
        self._node_ranks = range(first, first + ranks.local_world_size)
        self._tick_s = min(1.0, timeout_s / 10)
        self._sample_s = min(10.0, timeout_s / 2)  # seconds between two readings of all statuses
        self._main_thread_id = threading.get_ident()
        self._tick, self._sequence_number, self._idle_s = 0, -1, 0.0
        self._exit_reason: str | None = None
        self._failing = False
        self._finished = threading.Event()
        self._exit_lock = threading.Lock()
        self._publish()
        self._node_statuses: list[RankStatus] = []
        """First statuses of this node's ranks, which hold their process numbers."""
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        unanswered_s = failing_s = 0.0
        sample: tuple[float, list[RankStatus]] | None = None
        last = time.monotonic()
        while not self._finished.wait(self._tick_s):
            # count ticks, not the clock: after all ranks were suspended and continued, none of them was too slow
            passed_s = min(time.monotonic() - last, 2 * self._tick_s)
            last = time.monotonic()
            now = last_heartbeat()
            self._idle_s = self._idle_s + passed_s if now.sequence_number == self._sequence_number else 0.0
            self._sequence_number = now.sequence_number
            failing_s += passed_s if self._failing else 0.0
            if failing_s > _MAX_EXIT_S:  # the error has been reported, and something blocks the exit
                os._exit(1)
            limit_s = self._limit_s() + 0.01 * self._ranks.rank  # staggered, so that ranks do not all query at once
            diagnosis: Diagnosis | None = None
            try:
                diagnosis = _call_store(self._exchange)
                unanswered_s = 0.0
                if diagnosis is None and self._idle_s < limit_s - self._sample_s:
                    sample = None
                elif diagnosis is None and (sample is None or self._idle_s >= max(limit_s, sample[0] + self._sample_s)):
                    statuses = _call_store(self._read_statuses)
                    diagnosis = self._publish_diagnosis(diagnose(sample[1], statuses)) if sample is not None else None
                    sample = self._idle_s, statuses
            except (RuntimeError, TimeoutError):
                unanswered_s += passed_s
                diagnosis = self._diagnose_dead_node_rank()
                if unanswered_s > self._timeout_s:
                    diagnosis = diagnosis or diagnose_lost_store(self._status())
            if diagnosis is not None and not self._failing and not self._finished.is_set():
                self._exit_with(diagnosis)

    def _exchange(self) -> Diagnosis | None:
        self._publish()
        if not self._node_statuses and self._store.check(
            keys := [self._status_keys[rank] for rank in self._node_ranks]
        ):
            self._node_statuses = [RankStatus.from_json(text) for text in self._store.multi_get(keys)]
        return self._read_diagnosis()

    def _publish(self) -> None:
        self._tick += 1
        self._store.set(self._status_keys[self._ranks.rank], self._status().to_json())

    def _status(self) -> RankStatus:
        now = last_heartbeat()
        return RankStatus(
            rank=self._ranks.rank,
            tick=self._tick,
            step=now.step,
            phase=now.phase,
            idle_s=self._idle_s,
            limit_s=self._limit_s(),
            in_collective=_is_in_collective(sys._current_frames().get(self._main_thread_id)),
            exit_reason=self._exit_reason,
        )

    def _limit_s(self) -> float:
        return self._timeout_s * last_heartbeat().timeout_factor

    # --- the main thread ----------------------------------------------------------------------------------------------

    def report_failure(self, error: BaseException) -> None:
        """Publish the error, or exit with another rank's diagnosis. Return if this rank's error was the first."""
        self._failing = True
        try:
            own = self._own_diagnosis(error)
            diagnosis = self._find_cause() if _is_communication_error(error) else None
            if diagnosis is None and own is not None:
                diagnosis = _call_store(lambda: self._publish_diagnosis(own))
                if diagnosis != own:
                    write_stderr(f"[rank {self._ranks.rank}] failed as well: {type(error).__name__}: {error}")
        except (RuntimeError, TimeoutError):  # the store is gone
            diagnosis = own
        if diagnosis is not None and diagnosis != own:
            self._exit_with(diagnosis)
        self._leave_store(_STORE_TIMEOUT_S)

    def _own_diagnosis(self, error: BaseException) -> Diagnosis | None:
        """Return the diagnosis for the other ranks; None if they detect the error themselves."""
        if isinstance(error, UserError):
            if error.local_only:
                return diagnose_user_error(self._status(), str(error))
            self._exit_reason = str(error)
        elif isinstance(error, Exception):
            return diagnose_exception(self._status(), error)
        else:
            self._exit_reason = (
                "" if isinstance(error, SystemExit) and not error.code else f"ended by {type(error).__name__}"
            )
        _call_store(self._publish)
        return None

    def _find_cause(self) -> Diagnosis | None:
        """Return why a collective failed: a published diagnosis, or a rank that is gone; None if there is neither."""
        time.sleep(min(2.0, 0.01 * self._ranks.rank))  # the first rank's diagnosis spares the others the query
        try:
            _call_store(self._publish)
            before = _call_store(self._read_statuses)
            end = time.monotonic() + 3 * self._tick_s
            while True:
                diagnosis = _call_store(self._read_diagnosis) or _call_store(
                    lambda: self._publish_diagnosis(diagnose_exited_ranks(before))
                )
                if diagnosis is not None:
                    return diagnosis
                if time.monotonic() > end:
                    return _call_store(lambda: self._publish_diagnosis(diagnose(before, self._read_statuses())))
                time.sleep(0.1)
        except (RuntimeError, TimeoutError):
            return self._diagnose_dead_node_rank() or diagnose_lost_store(self._status())

    def finish(self) -> None:
        """Publish that this rank is done, and stop watching."""
        self._exit_reason = ""
        with contextlib.suppress(RuntimeError, TimeoutError):
            _call_store(self._publish)
        if not self._keeps_store:  # the store may be gone as soon as the last rank has left
            self._finished.set()
        self._leave_store(2 * self._timeout_s)
        self._finished.set()
        self._thread.join(_STORE_TIMEOUT_S)

    # --- both ---------------------------------------------------------------------------------------------------------

    def _read_statuses(self) -> list[RankStatus]:
        if self._store.check(self._status_keys):
            return [RankStatus.from_json(text) for text in self._store.multi_get(self._status_keys)]
        published = [self._store.check([key]) for key in self._status_keys]
        return [
            RankStatus.from_json(self._store.get(self._status_keys[rank])) if given else unknown_status(rank)
            for rank, given in enumerate(published)
        ]

    def _diagnose_dead_node_rank(self) -> Diagnosis | None:
        """Return what is known without the store. A dead rank was within a step of this rank's position."""
        own = self._status()
        return diagnose_exited_ranks(
            [replace(status, step=own.step, phase=own.phase) for status in self._node_statuses]
        )

    def _read_diagnosis(self) -> Diagnosis | None:
        return Diagnosis.from_json(self._store.get("end")) if self._store.check(["end"]) else None

    def _publish_diagnosis(self, diagnosis: Diagnosis | None) -> Diagnosis | None:
        """Publish a diagnosis to all ranks and return it. If one is published already, return that one."""
        if diagnosis is None:
            return None
        return Diagnosis.from_json(self._store.compare_set("end", "", diagnosis.to_json()))

    def _exit_with(self, diagnosis: Diagnosis) -> NoReturn:
        with self._exit_lock:  # either the watchdog thread or the main thread exits, not both
            rank = self._ranks.rank
            others = [r for r in self._node_ranks if r not in diagnosis.ranks]
            if rank == (others or self._node_ranks)[0]:
                write_stderr(diagnosis.message)
            if rank in diagnosis.ranks and diagnosis.is_stuck:
                stack = traceback.format_stack(sys._current_frames()[self._main_thread_id])
                write_stderr(f"[rank {rank}] is here:\n{''.join(stack).rstrip()}")
            self._leave_store(_STORE_TIMEOUT_S, dead_ranks=0 if diagnosis.is_stuck else len(diagnosis.ranks))
            with contextlib.suppress(OSError):
                if sys.stdout.isatty():
                    sys.stdout.write("\x1b[?25h")  # a progress bar has hidden the cursor
                sys.stdout.flush()
            delay_exit_for_peers()
            os._exit(diagnosis.exit_code)

    def _leave_store(self, timeout_s: float, dead_ranks: int = 0) -> None:
        """Leave the store. The rank that keeps it leaves last, so that no rank takes its end for a failure."""
        end = time.monotonic() + timeout_s
        with contextlib.suppress(RuntimeError, TimeoutError):
            left = _call_store(lambda: self._store.add("goodbye", 1))
            while self._keeps_store and left < self._ranks.world_size - dead_ranks and time.monotonic() < end:
                time.sleep(0.05)
                left = _call_store(lambda: self._store.add("goodbye", 0))


def _call_store(request: Callable[[], _Answer]) -> _Answer:
    """Return the store's answer to a request. Raise TimeoutError without an answer, and RuntimeError if it is gone."""
    answers: list[_Answer] = []
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
    """Return whether an error comes from torch's communication, so that another rank may have caused it."""
    if isinstance(error, UserError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or re.search(r"\bgloo\b|\bNCCL", str(error)) is not None


def _is_in_collective(frame: FrameType | None) -> bool:
    files: list[str] = []
    while frame is not None and len(files) < 3:
        files.append(frame.f_code.co_filename.replace(os.sep, "/"))
        frame = frame.f_back
    return any("torch/distributed/" in file for file in files)
