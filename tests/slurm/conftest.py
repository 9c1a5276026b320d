"""Real SLURM cluster for the tests in this folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.real_slurm import free_ports, slurm_unavailable
from tests.helpers.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "slurm" / "local_cluster.sh")
NODES = 7


class Slurm:
    """Commands to the cluster."""

    def __init__(self, environ: dict[str, str]) -> None:
        self._environ = environ

    def __call__(self, *command: str) -> str:
        return subprocess.run(
            command, env=self._environ, text=True, stdout=subprocess.PIPE, timeout=60, check=True
        ).stdout

    def cluster(self, *command: str) -> None:
        subprocess.run([SCRIPT, *command], env=self._environ, check=True, timeout=100)

    def job(self, job_id: int) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "-o", "show", "job", str(job_id))))

    def ends(self, job_id: int, within_s: float) -> dict[str, str]:
        end_states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

        def ended() -> dict[str, str]:
            job = self.job(job_id)
            return job if job["JobState"] in end_states else {}

        return wait_for(ended, within_s)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Start a cluster whose nodes report 8 GPUs and much memory, and stop it after the tests."""
    if (reason := slurm_unavailable()) is not None:
        pytest.skip(reason)
    folder = tempfile.mkdtemp(prefix="slurm")  # a socket's path must be short
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    environ |= {
        "QLORA_SLURM_DIR": folder,
        "QLORA_SLURM_PORT": str(free_ports(NODES)),
        "QLORA_SLURM_CPUS": "256",
        "QLORA_SLURM_MEMORY": "2000000",
        "QLORA_SLURM_GPUS": "8",
        "QLORA_SLURM_NODE_TIMEOUT": "5",
        "SLURM_CONF": f"{folder}/slurm.conf",
    }
    cluster = Slurm(environ)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = environ["SLURM_CONF"]
    try:
        cluster.cluster("up", str(NODES))
        yield cluster
    finally:
        cluster.cluster("down")
        shutil.rmtree(folder)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
