"""Systems that run beside each other and train one step at a time: each waits, loaded, for its turn.

So a system's step and its peers' are seconds apart. The machine's speed changes more from one minute to the next than
the systems differ.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LIMIT_S = 1800  # of a turn
POLL_S = 0.05


class PeerProcess:
    """A system's processes, from their start to their end.

    Args:
        command: starts all ranks.
        ranks: their number.
        folder: for its marks, output and turns; made here.
        environment: variables besides our own.
    """

    def __init__(self, command: Sequence[str], ranks: int, folder: Path, environment: Mapping[str, str]) -> None:
        folder.mkdir(parents=True)
        self._output, self._files = folder / "output.txt", [folder / f"{rank}.jsonl" for rank in range(ranks)]
        self._turns, self._late = 0, False
        self._pipes = [_pipe(folder / f"{rank}.turn") for rank in range(ranks)]
        self.code: int | None = None
        self.seconds = self.cpu_s = 0.0
        """Of loading and of its turns; of all of its processes, without what a busy machine adds."""
        started = time.monotonic()
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=os.environ | environment | {"PEERS_FOLDER": str(folder)},
                start_new_session=True,
            )
        self._wait(started)

    def turn(self) -> None:
        """Have it train a step; after the last one it ends."""
        started = time.monotonic()
        self._turns += 1
        for pipe in self._pipes:
            os.write(pipe, b"\n")
        self._wait(started)

    def end(self) -> None:
        """Kill what is still there."""
        if self.code is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._reap()

    def marks(self) -> list[list[dict[str, Any]]]:
        """Of each rank that has left some."""
        files = filter(Path.is_file, self._files)
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]

    def error(self) -> str | None:
        """If it has failed, its exit code and the end of what it wrote, without torchrun's own words behind that."""
        if not self.code:
            return None
        if self._late:
            return f"exit code {self.code}: TimeoutError: not ready for its next turn within {LIMIT_S} s"
        text = self._output.read_text()
        if self.code == -signal.SIGKILL or "Signal 9 (SIGKILL)" in text:
            return f"exit code {self.code}: MemoryError: killed, as for memory; compare fewer --systems at a time"
        lines = text.splitlines()
        words = ("torch/distributed/elastic", "torch/distributed/run.py")
        behind = next((index for index, line in enumerate(lines) if any(word in line for word in words)), len(lines))
        return f"exit code {self.code}: " + "\n".join(lines[:behind] or lines)[-3000:]

    def _wait(self, started: float) -> None:
        """Until all ranks wait for their next turn, or have ended."""
        while self.code is None and not self._ready():
            if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                self._reap()
            elif time.monotonic() - started > LIMIT_S:
                self._late = True
                self.end()
            time.sleep(POLL_S)
        self.seconds += time.monotonic() - started

    def _ready(self) -> bool:
        return all(file.is_file() and file.read_text().count('"ready"') > self._turns for file in self._files)

    def _reap(self) -> None:
        before = _children_cpu_s()
        self.code = self._process.wait()
        self.cpu_s = _children_cpu_s() - before
        for pipe in self._pipes:
            os.close(pipe)


def _pipe(file: Path) -> int:
    """Open for both, so that nobody waits here for a process that has died."""
    os.mkfifo(file)
    return os.open(file, os.O_RDWR)


def _children_cpu_s() -> float:
    """Of all processes that have been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
