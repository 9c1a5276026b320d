"""If this fails, a killed torchrun leaves ranks behind that hold their GPUs, or a rank dies that has no agent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
CHILD = (
    "import os, time; from qlora_dist.launch.orphans import die_with_parent; die_with_parent(); "
    "print(os.getpid(), flush=True); time.sleep(60)"
)


def running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only there")
@pytest.mark.parametrize("under_torchrun", [True, False])
def test_a_rank_dies_with_its_agent_and_with_nobody_else(under_torchrun):
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    environ |= {"PYTHONPATH": str(ROOT)} | ({"TORCHELASTIC_RUN_ID": "1"} if under_torchrun else {})
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], env=environ, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        assert running(child)
        parent.kill()
        parent.wait()
        end = time.monotonic() + (5 if under_torchrun else 0.5)
        while running(child) and time.monotonic() < end:
            time.sleep(0.02)
        assert running(child) != under_torchrun
    finally:
        if running(child):
            os.kill(child, signal.SIGKILL)
        parent.stdout.close()
