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
    "import os, time; from qlora_dist.runtime.process_exit import die_with_parent; die_with_parent(); "
    "print(os.getpid(), flush=True); time.sleep(60)"
)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl and /proc")
@pytest.mark.parametrize(
    "launcher",
    [{"TORCHELASTIC_RUN_ID": "1", "RANK": "0"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"SLURM_STEP_ID": "0"}, {}],
    ids=["torchrun", "mpirun", "srun", "none"],
)
def test_a_rank_dies_with_its_launcher_and_with_no_other_process(launcher):
    known = ("TORCHELASTIC", "SLURM", "OMPI", "PMI")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(known)}
    environ |= {"PYTHONPATH": str(ROOT), **launcher}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], env=environ, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        assert running(child)
        parent.kill()
        parent.wait()
        end = time.monotonic() + (60 if launcher else 1.5)
        while running(child) and time.monotonic() < end:
            time.sleep(0.02)
        assert running(child) != bool(launcher)
    finally:
        if running(child):
            os.kill(child, signal.SIGKILL)
        parent.stdout.close()
