"""If this fails, torchrun's own restart fails where a rank has died, or a killed torchrun leaves ranks behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.helpers import tiny_models

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]

_T = TypeVar("_T")


def wait_for(condition: Callable[[], _T], within_s: float) -> _T:
    end = time.monotonic() + within_s
    while not (result := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return result


def rank_pids(agent: int) -> dict[str, int]:
    """Return the process ids of an agent's ranks."""
    pids = {}
    for number in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        with contextlib.suppress(OSError):
            environ = dict(
                entry.split("=", 1) for entry in Path(f"/proc/{number}/environ").read_text().split("\0") if entry
            )
            if "TORCHELASTIC_RUN_ID" in environ:
                pids[environ["RANK"]] = int(number)
    return pids


def is_running(number: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@contextlib.contextmanager
def torchrun(config: Path, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environ.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
    command = [sys.executable, *TORCHRUN, "-m", "qlora_dist", "train", str(config), "run.overwrite=true"]
    with output.open("w") as file:
        process = subprocess.Popen(command, env=environ, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_restart_in_place_and_a_killed_agent(tiny_llama_nf4, tmp_path):
    endless = {"train__steps": 10**6, "train__global_batch": 2, "train__save_every": 1, "data__eval": None}
    config = tiny_models.make_config(tmp_path, tiny_llama_nf4, **endless)
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"

    def steps() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    with torchrun(config, tmp_path / "output.txt") as agent:
        wait_for(lambda: steps() >= 3, 90)
        first = rank_pids(agent.pid)
        os.kill(first["1"], signal.SIGKILL)
        second = wait_for(lambda: {} if first.items() & (new := rank_pids(agent.pid)).items() else new, 40)
        metrics.unlink(missing_ok=True)
        wait_for(lambda: steps() >= 3, 90)
        assert "resumes after " in (tmp_path / "output.txt").read_text(), "run.overwrite is for the first start"
        agent.kill()
        wait_for(lambda: not any(map(is_running, second.values())), 5)
    messages = [line for line in (tmp_path / "output.txt").read_text().splitlines() if line.startswith("qlora-dist: ")]
    assert all("rank 1 on" in line and "went away after step" in line for line in messages), messages
    assert len(messages) <= 1  # torchrun may end rank 0 before it prints the line
