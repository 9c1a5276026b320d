"""Requests to stop: by a signal, by a file in the run's folder, by the clock. No torch: handlers must be installed
before the minute that its import and the model's loading take.
"""

from __future__ import annotations

import atexit
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

import psutil

from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import detect_launcher, read_rank_info
from qlora_dist.runtime.heartbeat import last_heartbeat

STOP_SIGNALS = {
    "SIGTERM": signal.SIGTERM,
    "SIGUSR1": signal.SIGUSR1,
    "SIGUSR2": signal.SIGUSR2,
    "SIGINT": signal.SIGINT,
    "SIGHUP": signal.SIGHUP,
}
STOP_REASONS = (*STOP_SIGNALS, "STOP", "max_time")
"""Why a run stops before its last step, in the order of the flags."""
MANUAL_STOP_REASONS = ("SIGINT", "STOP")
"""Stop reasons given by a person. A scheduler must not restart the run after one of these."""
STOP_FILE, SAVE_FILE = "STOP", "SAVE"

_received: set[str] = set()
_process_started = time.monotonic()


def install_signal_handlers() -> None:
    """Take note of signals from here on, and go on. The second SIGINT ends the process at once.

    The others may come as often as they like: SLURM under torchrun sends SIGTERM twice, job scripts repeat theirs.
    SIGHUP stays ignored where it is ignored already, as under nohup.
    """
    for name, number in STOP_SIGNALS.items():
        if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _record_signal)
    _start_signal_thread()
    atexit.register(_ignore_late_signals)


def _ignore_late_signals() -> None:
    """Ignore late signals while Python ends.

    Python restores the default handlers at exit. A late signal would kill a rank that has saved, and the launcher would
    then kill ranks that are still saving.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        signal.signal(STOP_SIGNALS[name], signal.SIG_IGN)


def _record_signal(number: int, frame: FrameType | None) -> None:
    _received.add(signal.Signals(number).name)


def _start_signal_thread() -> None:
    """Answer each signal in a thread: Python runs handlers in the main thread only, and not while that computes.

    A step or a collective may keep the main thread for a minute. The file descriptor is written to by the system's own
    handler.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # the workers of a pool share the pipe: a signal to one of them is none to the run
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    try:
        is_rank_0 = read_rank_info().rank == 0
    except UserError:
        is_rank_0 = True
    threading.Thread(target=_acknowledge_signals, args=(reading, is_rank_0), name="signals", daemon=True).start()


def _acknowledge_signals(pipe_fd: int, is_rank_0: bool) -> None:
    names = {int(number): name for name, number in STOP_SIGNALS.items()}
    acknowledged: set[str] = set()
    while True:
        for number in os.read(pipe_fd, 64):
            name = names.get(number)
            if name == "SIGINT" and name in acknowledged:
                _exit_at_once(is_rank_0)
            elif name is not None and name not in acknowledged:
                acknowledged.add(name)
                if is_rank_0:
                    _write_stderr(
                        f"{'Ctrl-C' if name == 'SIGINT' else name}: {_describe_next_action(again=name == 'SIGINT')}"
                    )


def _describe_next_action(again: bool) -> str:
    now = last_heartbeat()
    step = f"step {now.step + 1}"
    if now.phase in ("reading data", "training"):
        doing, without = f"finishing {step}, then saving a checkpoint", "end without one"
    elif now.phase == "evaluating":
        doing, without = f"leaving the evaluation after {now.step} steps, with a checkpoint", "end without one"
    elif now.phase == "saving a checkpoint":
        doing, without = f"finishing the checkpoint, and {step} if it has begun", "end without them"
    elif now.phase in ("starting", "loading"):
        doing, without = "stopping as soon as the model is loaded, before the next step", "end at once"
    else:
        doing, without = "finishing what is left to save", "end without it"
    return f"{doing}{f'; press Ctrl-C again to {without}' if again else ''}"


def _exit_at_once(is_rank_0: bool) -> None:
    if is_rank_0:
        _write_stderr(
            "ended by the second Ctrl-C without a checkpoint; the same command goes on from the newest one, if any"
        )
    with suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # a progress bar has hidden the cursor
    os._exit(128 + signal.SIGINT)


def _write_stderr(text: str) -> None:
    with suppress(OSError):  # a terminal that was closed
        # a progress bar leaves the cursor at the end of its line
        os.write(2, f"{chr(10) if os.isatty(2) else ''}qlora-dist: {text}\n".encode())


def remove_stale_stop_file(run: Path) -> str | None:
    """Remove a STOP file that was there before this run was started: it was meant for an earlier start.

    One that is newer is left, and obeyed. Both ages are differences on one clock: that of the file system, and that of
    this machine.

    Returns:
        A sentence, if there was one.
    """
    stop = run / STOP_FILE
    try:
        with tempfile.NamedTemporaryFile(dir=run, prefix=".now-") as now:
            age_s = Path(now.name).stat().st_mtime - stop.stat().st_mtime
        if age_s <= time.time() - _launcher_start_time():
            return None
        stop.unlink()
    except OSError:
        return None
    return f"{stop}: was there before this start, and is removed; create it again to stop this run"


def _launcher_start_time() -> float:
    """Time at which the run was started: by torchrun and the like, their start, for ranks take seconds to follow."""
    own = psutil.Process()
    started: float = own.create_time()
    try:
        launcher = own.parent() if detect_launcher() != "none" else None
        launched: float = started if launcher is None else launcher.create_time()
    except psutil.Error:
        return started
    return min(started, launched)


class StopRequests:
    """What this rank is asked for. Files and clock are looked at by rank 0 only."""

    def __init__(
        self,
        run_path: Path,
        is_rank_0: bool,
        max_time: timedelta | None,
        checkpoint_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Ask for nothing yet.

        Args:
            run_path: the run's folder.
            is_rank_0: whether this is rank 0.
            max_time: of this start; None: unlimited.
            checkpoint_s: time that a checkpoint takes.
        """
        self._run, self._is_first, self._saving_s = run_path, is_rank_0, checkpoint_s
        self._max_time_s = None if max_time is None else max_time.total_seconds()

    def flags(self, ahead_s: float) -> list[float]:
        """1 for each of REASONS that holds, and for a wish to save: to be summed over ranks.

        Args:
            ahead_s: time until a run that goes on now can begin its last checkpoint.
        """
        signals = [float(name in _received) for name in STOP_SIGNALS]
        if not self._is_first:
            return [*signals, 0.0, 0.0, 0.0]
        end_s = time.monotonic() - _process_started + ahead_s + self._saving_s()
        late = self._max_time_s is not None and end_s > self._max_time_s
        return [*signals, self._file_flag(STOP_FILE), float(late), self._file_flag(SAVE_FILE)]

    def acknowledge(self, sums: Sequence[float], saved: bool = True) -> None:
        """Take the files away that all ranks know of.

        Args:
            sums: of the flags.
            saved: whether a checkpoint was written, if one was asked for.
        """
        asked = {STOP_FILE: sums[STOP_REASONS.index(STOP_FILE)] > 0, SAVE_FILE: saved and is_save_requested(sums)}
        for name, known in asked.items():
            if known and self._is_first:
                with suppress(OSError):
                    (self._run / name).unlink()

    def _file_flag(self, name: str) -> float:
        return float((self._run / name).exists())


def stop_reason(sums: Sequence[float]) -> str | None:
    """Why to stop, from the flags' sums over the ranks."""
    return next((name for name, count in zip(STOP_REASONS, sums, strict=False) if count), None)


def is_save_requested(sums: Sequence[float]) -> bool:
    """Whether a checkpoint was asked for."""
    return sums[len(STOP_REASONS)] > 0
