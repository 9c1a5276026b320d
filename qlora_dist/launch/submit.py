"""Handing a script to SLURM, and watching the job. The only place that calls SLURM's commands."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from qlora_dist.errors import UserError

_POLL_S = 1.0


def submit(script: Path) -> int:
    """Submit a script.

    Returns:
        The job's number.

    Raises:
        UserError: there is no SLURM here, or it refuses.
    """
    answer = _slurm("sbatch", "--parsable", str(script))
    if answer.returncode != 0:
        reason = " ".join(answer.stderr.split()).removeprefix("sbatch: error: ")
        raise UserError(f"{script}: sbatch refuses it ({reason}); correct the cluster's file")
    return int(answer.stdout.strip().split(";")[0])


def state(job_id: int) -> str | None:
    """PENDING, RUNNING and the like; None: the job is over, or SLURM doesn't know it."""
    answer = _slurm("squeue", "--noheader", f"--jobs={job_id}", "--format=%T")
    states = answer.stdout.split()
    return states[0] if answer.returncode == 0 and states else None


def follow(job_id: int, log: Path, write: Callable[[str], object]) -> None:
    """Hand on what the job writes, until it is over."""
    position, over = 0, False
    while True:
        if log.exists():
            with log.open(encoding="utf-8", errors="replace") as file:
                file.seek(position)
                write(file.read())
                position = file.tell()
        if over:
            return
        over = state(job_id) is None
        time.sleep(_POLL_S)


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    # from within a job, its own variables would be taken for options
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
    try:
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]}: there is no such command; submit from a login node of a SLURM cluster, try "
            "slurm/local_cluster.sh, or see the script with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: SLURM does not answer; see that its controller runs (scontrol ping)") from None
