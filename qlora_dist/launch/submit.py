"""Submission of a script to SLURM, and its output."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from qlora_dist.errors import UserError
from qlora_dist.launch.run_list import print_new_output
from qlora_dist.launch.slurm_queue import queued_jobs

_POLL_S = 1.0


def sbatch(script: Path) -> int:
    """Submit a script and return the job's number.

    Raises:
        UserError: SLURM is not installed here, or it refuses the script.
    """
    # inside a job, sbatch would take that job's variables for options
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
    command = ["sbatch", "--parsable", str(script)]
    try:
        answer = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise UserError(
            "sbatch: there is no such command; submit from a login node of a SLURM cluster, try "
            "slurm/local_cluster.sh, or see the script with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError("sbatch: SLURM does not answer; check that its controller runs (scontrol ping)") from None
    if answer.returncode != 0:
        reason = " ".join(answer.stderr.split()).removeprefix("sbatch: error: ")
        raise UserError(f"{script}: sbatch refuses it ({reason}); correct the cluster's file")
    return int(answer.stdout.strip().split(";")[0])


def follow_job(job_id: int, log: Path) -> None:
    """Print the job's output until it ends."""
    position, has_ended = 0, False
    while True:
        position = print_new_output(log, position)
        if has_ended:
            return
        jobs = queued_jobs()
        has_ended = jobs is not None and str(job_id) not in jobs
        time.sleep(_POLL_S)
