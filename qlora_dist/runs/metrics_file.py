"""File metrics.jsonl, which has one complete JSON line per step."""

from __future__ import annotations

import json
import math
import sys
from io import RawIOBase
from pathlib import Path
from typing import Any

from qlora_dist.errors import write_stderr
from qlora_dist.runs.json_object import parse_json_object


class MetricsFile:
    """Metrics file of a run, open for writing.

    A full disk does not end the run. Lines that cannot be written are kept in memory and written when there is room.
    """

    def __init__(self, path: Path, step: int) -> None:
        """Keep the lines of steps up to `step` (-1: none), and drop later ones, because they will be repeated."""
        self._path = path
        lines = _lines_until(path, step)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(b"".join(lines))
        partial.replace(path)
        # unbuffered, so that a write either fails at once or is complete
        self._file: RawIOBase = path.open("r+b", buffering=0)
        self._written = sum(map(len, lines))
        """Bytes of complete lines in the file."""
        self._last = lines[-1] if lines else b""
        """Last line, whether written or not."""
        self._unwritten: list[bytes] = []
        self._replaced = b""
        """Line in the file that the first unwritten line replaces."""
        self._failing = False

    def roll_back(self, step: int) -> None:
        """Drop the lines of steps after `step`, whether written or not. This needs no room on the disk."""
        self.flush()
        kept = _lines_until(self._path, step)
        self._unwritten = [line for line in self._unwritten if (parse_step(line) or 0) <= step]
        if kept[-1:] != [self._replaced]:
            self._replaced = b""
        self._written = sum(map(len, kept)) - len(self._replaced)
        self._file.truncate(self._written + len(self._replaced))
        self._last = (self._unwritten or kept or [b""])[-1]

    def append(self, row: dict[str, Any]) -> None:
        """Append a line. It is passed to the operating system before this returns, unless the disk is full."""
        self._last = (json.dumps(nonfinite_to_none(row)) + "\n").encode()
        self._unwritten.append(self._last)
        self.flush()

    def extend_step(self, step: int, values: dict[str, Any]) -> None:
        """Add values to the last line if it belongs to the step. Otherwise append a line with them.

        A line without new values is not rewritten, so that a program that follows the file sees it once.
        """
        before = json.loads(self._last) if self._last else {}
        if before.get("step") != step:
            self.append({"step": step, **values})
            return
        row = before | nonfinite_to_none(values)
        if row == before:
            return
        line = (json.dumps(row) + "\n").encode()
        if self._unwritten:
            self._unwritten[-1] = line
        else:
            self._written -= len(self._last)
            self._unwritten, self._replaced = [line], self._last
        self._last = line
        self.flush()

    def last_value(self, step: int, key: str) -> Any:
        """Return a value of the last line; None if the line belongs to another step or lacks the key."""
        row = json.loads(self._last) if self._last else {}
        return row.get(key) if row.get("step") == step else None

    def values(self, key: str) -> list[float]:
        """Return the number under `key` of each line that has one."""
        rows = map(json.loads, _lines_until(self._path, sys.maxsize))
        return [row[key] for row in rows if isinstance(row.get(key), (int, float))]

    def flush(self) -> bool:
        """Write the lines that could not be written before. Return whether all are written."""
        try:
            while self._unwritten:
                line = self._unwritten[0]
                self._file.seek(self._written)
                count = self._file.write(line) or 0
                if count < len(line):
                    self._file.truncate(self._written)
                    self._file.seek(self._written)
                    self._file.write(self._replaced)
                    raise OSError(f"{count} of {len(line)} bytes were written")
                self._written += len(line)
                self._replaced = b""
                del self._unwritten[0]
        except OSError as error:
            if not self._failing:
                self._failing = True
                reason = error.strerror or str(error)
                write_stderr(f"{self._path}: cannot be written ({reason}); its lines are kept and written when it can")
            return False
        self._failing = False
        return True

    def close(self) -> None:
        """Write the remaining lines if possible, and close the file."""
        if not self.flush():
            write_stderr(f"{self._path}: the lines of its last {len(self._unwritten)} steps could not be written")
        self._file.close()


def nonfinite_to_none(values: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity by null, because JSON has no such numbers. A skipped step has them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def parse_step(line: bytes) -> int | None:
    """Return the step of a line of metrics.jsonl; None if it is not such a line."""
    step = parse_json_object(line).get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _lines_until(path: Path, step: int) -> list[bytes]:
    """Return the lines of steps up to `step`, in order of steps. If a step has two lines, the later one counts.

    A line without a step is incomplete, because its process was killed.
    """
    kept: dict[int, bytes] = {}
    if step >= 0 and path.exists():
        for line in path.read_bytes().splitlines():
            done = parse_step(line)
            if done is not None and done <= step:
                kept[done] = line + b"\n"
    return [kept[done] for done in sorted(kept)]
