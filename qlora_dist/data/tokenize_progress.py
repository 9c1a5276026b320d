"""Progress of tokenizing: a bar on a terminal, lines elsewhere, and a file for waiting processes."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_LINE_INTERVAL_S = 10.0
_NOTE_INTERVAL_S = 2.0


class RowProgress:
    """Progress display that counts rows without a known total, and keeps a file up to date for waiting processes."""

    def __init__(self, console: Console, name: str, progress_path: Path) -> None:
        self._console, self._name, self._note = console, name, progress_path
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(f"tokenizing {name}", total=None, done="")
        self._start = self._last_line_s = self._last_note_s = time.monotonic()

    def __call__(self, rows: int) -> None:
        """Show that `rows` rows are finished."""
        now = time.monotonic()
        done = f"{rows:,} rows, {rows / (now - self._start):,.0f} rows/s"
        self._bar.update(self._task, done=done)
        if now - self._last_note_s > _NOTE_INTERVAL_S:
            self._last_note_s = now
            with contextlib.suppress(OSError):
                self._note.write_text(done, encoding="utf-8")
        if not self._console.is_terminal and now - self._last_line_s > _LINE_INTERVAL_S:
            self._last_line_s = now
            self._console.print(f"tokenizing {self._name}: {done}", markup=False, highlight=False)

    def __enter__(self) -> RowProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
