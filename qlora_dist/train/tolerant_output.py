"""Console output that may get lost, so that a closed terminal or a full disk ends no run. No torch."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

LOST_OUTPUT_FILE = "output-lost.txt"
"""File in the run's folder that lists which output was lost, since when and why."""
_FULL_PIPE_WAIT_S = 5.0
"""Seconds to wait for a pipe that is full and does not block."""

_lost: list[str] = []
_lost_output_path: Path | None = None


def tolerate_output_errors() -> None:
    """Make stdout and stderr of this process streams that never fail.

    A write that fails is dropped. If the disk is full, the next write is tried as usual. A closed pipe or terminal is
    replaced by /dev/null, for libraries and subprocesses too.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        try:
            if stream.fileno() != number:
                continue
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # the output is lost already, and the new stream reports why
        if isinstance(stream, io.TextIOWrapper):
            encoding, errors = stream.encoding, stream.errors
            # each line is one write, because several ranks may write to one file
            setattr(sys, name, io.TextIOWrapper(_TolerantStream(number), encoding, errors, line_buffering=True))


def record_lost_output(run_path: Path) -> None:
    """List lost output in the run's folder from now on. Called on rank 0."""
    global _lost_output_path
    _lost_output_path = run_path / LOST_OUTPUT_FILE
    with suppress(OSError):
        _lost_output_path.unlink()
    lost = _lost.copy()
    _lost.clear()
    for line in lost:
        _record_loss(line)


def _record_loss(line: str) -> None:
    _lost.append(line)
    if _lost_output_path is not None:
        with suppress(OSError), _lost_output_path.open("a", encoding="utf-8") as file:
            file.write(line)


class _TolerantStream(io.RawIOBase):
    def __init__(self, number: int) -> None:
        self._fd, self._failing = number, False

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, content: ReadableBuffer, /) -> int:
        left = memoryview(content).cast("B")
        size = len(left)
        try:
            while left:
                try:
                    left = left[os.write(self._fd, left) :]
                except BlockingIOError:
                    if not select.select([], [self._fd], [], _FULL_PIPE_WAIT_S)[1]:
                        raise
            self._failing = False
        except OSError as error:
            self._fail(error)
        return size

    def _fail(self, error: OSError) -> None:
        if not self._failing:
            self._failing = True
            name, now = {1: "stdout", 2: "stderr"}[self._fd], time.strftime("%Y-%m-%d %H:%M:%S")
            _record_loss(f"{now}: {name} cannot be written ({error.strerror}); the run continues without it\n")
        if error.errno in (errno.EPIPE, errno.EIO, errno.EBADF):
            with suppress(OSError):
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, self._fd)
                if devnull != self._fd:
                    os.close(devnull)
