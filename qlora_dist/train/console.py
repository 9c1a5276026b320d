"""The output of a run: a progress bar on a terminal, plain lines elsewhere. Only rank 0 prints."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from qlora_dist.io.read_ahead import ReadProgress
from qlora_dist.runtime.byte_sizes import format_bytes

_LOAD_LINE_INTERVAL_S = 10.0
"""Seconds between two lines about loading."""


class RunConsole:
    """Output of a run. It is silent on ranks other than 0.

    With `plain` it prints lines even on a terminal. Open MPI gives its ranks a terminal and writes to a file itself.
    """

    def __init__(self, rank: int, *, plain: bool = False) -> None:
        soft_wrap, terminal = plain or not sys.stdout.isatty(), False if plain else None
        self.console = Console(quiet=rank != 0, highlight=False, soft_wrap=soft_wrap, force_terminal=terminal)
        self._live = self.console.is_terminal and rank == 0
        self._progress: Progress | None = None
        self._load_start = self._load_line = time.perf_counter()
        self.reading = ReadProgress(0, 0, 0.0)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def start_loading(self) -> None:
        """Start the clock of `loaded` and `log_loaded`."""
        self._load_start = self._load_line = time.perf_counter()

    def loaded(self, reading: ReadProgress) -> None:
        """Update the bar after a read of the base, or print a line every few seconds where there is no terminal."""
        self.reading = reading
        if self._live:
            if self._progress is None:
                self._show("loading", reading.total_bytes, DownloadColumn(), TransferSpeedColumn())
            assert self._progress is not None
            self._progress.update(self._task, completed=reading.read_bytes)
            if reading.read_bytes == reading.total_bytes:
                self.close_progress()
            return
        now = time.perf_counter()
        if now - self._load_line > _LOAD_LINE_INTERVAL_S:
            self._load_line = now
            seconds = now - self._load_start
            rate = reading.read_bytes / seconds
            left_s = seconds * (reading.total_bytes / max(reading.read_bytes, 1) - 1)
            done = f"{format_bytes(reading.read_bytes)} of {format_bytes(reading.total_bytes)} read by this rank"
            self.say(f"loading: {done}, {format_bytes(rate)}/s, {left_s:.0f} s left")

    def log_loaded(self, static_bytes: int) -> None:
        """Print a line about the bytes and the time that loading took."""
        seconds = time.perf_counter() - self._load_start
        reading = f"{format_bytes(self.reading.read_bytes)} read by this rank in {seconds:.1f} s"
        waiting = f"{100 * self.reading.wait_s / seconds:.0f} % of it waiting for reads"
        self.say(f"loaded: {reading}, {waiting}; it holds {format_bytes(static_bytes)}")

    def start_steps(self, steps: int, done: int = 0) -> None:
        self.close_progress()
        self._steps, self._done, self._start = steps, done, time.perf_counter()
        if self._live:
            self._show("step", steps, MofNCompleteColumn())

    def _show(self, description: str, total: int, *columns: ProgressColumn) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
        self._progress = Progress(*columns, console=self.console)
        self._task = self._progress.add_task(description, total=total)
        self._progress.start()

    def log_step(self, step: int, loss: float, lr: float, tokens_per_s: float, peak_bytes: int) -> None:
        """Update the bar after a step, counted from 1, or print a line."""
        text = f"loss {loss:.4f}  lr {lr:.2e}  {tokens_per_s:,.0f} tokens/s  {format_bytes(peak_bytes)}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
            return
        left_s = (time.perf_counter() - self._start) / (step - self._done) * (self._steps - step)
        self.say(f"step {step}/{self._steps}  {text}  {left_s:.0f} s left")

    def close_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> RunConsole:
        return self

    def __exit__(self, *error: object) -> None:
        self.close_progress()


def pluralize(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
