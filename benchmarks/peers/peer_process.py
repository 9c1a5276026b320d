"""Systems that are loaded at the same time and train one step at a time in turns.

So the steps of different systems are only seconds apart. The machine's speed changes more from one minute to the next
than between systems.
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

LIMIT_S = 1800  # longest time of a turn
POLL_S = 0.05


class PeerProcess:
    """The processes of a system.

    Args:
        command: command that starts all ranks.
        ranks: number of ranks.
        folder: new folder for marks, output and turns.
        environment: variables added to this process's environment.
    """

    def __init__(self, command: Sequence[str], ranks: int, folder: Path, environment: Mapping[str, str]) -> None:
        folder.mkdir(parents=True)
        self._output, self._files = folder / "output.txt", [folder / f"{rank}.jsonl" for rank in range(ranks)]
        self._turns, self._late = 0, False
        self._pipes = [_pipe(folder / f"{rank}.turn") for rank in range(ranks)]
        self.code: int | None = None
        self.seconds = self.cpu_s = 0.0
        """Wall seconds of loading and turns, and processor seconds of all its processes."""
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
        """Let the system train a step; it exits after the last one."""
        started = time.monotonic()
        self._turns += 1
        for pipe in self._pipes:
            os.write(pipe, b"\n")
        self._wait(started)

    def end(self) -> None:
        """Kill the processes that still run."""
        if self.code is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._reap()

    def marks(self) -> list[list[dict[str, Any]]]:
        """Return the marks of each rank that has written some."""
        files = filter(Path.is_file, self._files)
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]

    def error(self) -> str | None:
        """Return the exit code and the end of the output without torchrun's messages; None if it did not fail."""
        if not self.code:
            return None
        if self._late:
            return f"exit code {self.code}: TimeoutError: not ready for its next turn within {LIMIT_S} s"
        text = self._output.read_text()
        if self.code == -signal.SIGKILL or "Signal 9 (SIGKILL)" in text:
            return f"exit code {self.code}: MemoryError: killed, likely for memory; compare fewer --systems at a time"
        lines = text.splitlines()
        files = ("torch/distributed/elastic", "torch/distributed/run.py")
        end = next((index for index, line in enumerate(lines) if any(file in line for file in files)), len(lines))
        return f"exit code {self.code}: " + "\n".join(lines[:end] or lines)[-3000:]

    def _wait(self, started: float) -> None:
        """Wait until all ranks wait for their next turn, or have ended."""
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
    """Make a pipe and open it for reading and writing, so that a dead process does not block this one."""
    os.mkfifo(file)
    return os.open(file, os.O_RDWR)


def _children_cpu_s() -> float:
    """Return the processor seconds of all child processes that have been reaped."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
