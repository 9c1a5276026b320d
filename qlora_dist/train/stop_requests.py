"""Requests to stop by a signal, by a file in the run's folder or by the clock.

This module does not import torch, because signal handlers must be installed before that import, which takes seconds.
"""

from __future__ import annotations

import atexit
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType

import psutil

from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import detect_launcher, read_rank_info
from qlora_dist.runtime.heartbeat import last_heartbeat
from qlora_dist.train.control_flags import ControlFlags

STOP_SIGNALS = {name: signal.Signals[name] for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP")}
STOP_FILE, SAVE_FILE = "STOP", "SAVE"

_received: set[str] = set()
_process_started = time.monotonic()


def install_signal_handlers() -> None:
    """Record signals from now on instead of ending the process. The second SIGINT ends it at once.

    Other signals may be repeated: SLURM under torchrun sends SIGTERM twice, and job scripts repeat their signal. SIGHUP
    stays ignored if it already is, as under nohup.
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
    """Acknowledge each signal in a thread.

    Python runs handlers only in the main thread, which a step or a collective may block for a minute. The C handler
    writes to the file descriptor at once.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # workers of a process pool share the pipe, but a signal to one of them is not meant for the run
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    try:
        is_rank_0 = read_rank_info().rank == 0
    except UserError:
        is_rank_0 = True
    threading.Thread(
        target=_acknowledge_signals, args=(reading,), kwargs={"is_rank_0": is_rank_0}, name="signals", daemon=True
    ).start()


def _acknowledge_signals(pipe_fd: int, *, is_rank_0: bool) -> None:
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
            "ended by the second Ctrl-C without a checkpoint; the same command resumes from the newest one, if any"
        )
    with suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # show the cursor, which a progress bar hides
    os._exit(128 + signal.SIGINT)


def _write_stderr(text: str) -> None:
    with suppress(OSError):  # the terminal may be closed
        # a progress bar leaves the cursor at the end of its line
        os.write(2, f"{chr(10) if os.isatty(2) else ''}qlora-dist: {text}\n".encode())


def remove_stale_stop_file(run: Path) -> str | None:
    """Remove a STOP file that is older than this start, because it was meant for an earlier one.

    Return a sentence if a file was removed. A newer one stays and stops the run. Each age is a difference on one clock:
    the file system's, or this machine's.
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
    """Return the time at which the run, or its launcher, was started. Ranks start seconds after their launcher."""
    own = psutil.Process()
    started: float = own.create_time()
    try:
        launcher = own.parent() if detect_launcher() != "none" else None
        launched: float = started if launcher is None else launcher.create_time()
    except psutil.Error:
        return started
    return min(started, launched)


class StopRequests:
    """Requests to stop or save that this rank has received. Only rank 0 looks at the files and the clock.

    `checkpoint_s` returns the seconds that a checkpoint takes, which `max_time` includes.
    """

    def __init__(
        self,
        run_path: Path,
        *,
        is_rank_0: bool,
        max_time: timedelta | None = None,
        checkpoint_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._run, self._is_rank_0, self._checkpoint_s = run_path, is_rank_0, checkpoint_s
        self._max_time_s = None if max_time is None else max_time.total_seconds()

    def flags(self, ahead_s: float) -> ControlFlags:
        """Return this rank's flags. If the run continued, the last checkpoint could begin in `ahead_s` seconds."""
        signals = ControlFlags(**{name.lower(): int(name in _received) for name in STOP_SIGNALS})
        if not self._is_rank_0:
            return signals
        end_s = time.monotonic() - _process_started + ahead_s + self._checkpoint_s()
        return replace(
            signals,
            stop_file=int(self._has_file(STOP_FILE)),
            max_time=int(self._max_time_s is not None and end_s > self._max_time_s),
            save_file=int(self._has_file(SAVE_FILE)),
        )

    def acknowledge(self, flags: ControlFlags, *, saved: bool = True) -> None:
        """Remove the request files that all ranks have seen. SAVE stays unless its checkpoint was begun (`saved`)."""
        seen = {STOP_FILE: flags.stop_file, SAVE_FILE: saved and flags.save_file}
        for name, is_seen in seen.items():
            if is_seen and self._is_rank_0:
                with suppress(OSError):
                    (self._run / name).unlink()

    def _has_file(self, name: str) -> bool:
        return (self._run / name).exists()
