"""Submission to SLURM's queue, queries of it, and cancelling."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qlora_dist.errors import UserError

_SLURM_TIMEOUT_S = 20.0
"""Seconds until SLURM counts as silent. A client would retry for minutes without its controller."""
WAITING_STATES = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "SPECIAL_EXIT")
_ENDED_STATES = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY"),
    *("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED", "UNKNOWN"),
)


@dataclass(frozen=True)
class JobState:
    """State of a job in SLURM."""

    state: str
    """SLURM's name of the state, such as PENDING; UNKNOWN if the job has ended and SLURM has no record of it."""
    reason: str = ""
    """SLURM's reason why the job waits."""
    nodes: str = ""
    """Node list in SLURM's notation."""

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED_STATES


def sbatch(script: Path) -> int:
    """Submit a script and return the job's number."""
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


def job_state(job_id: int) -> JobState | None:
    """Return the state of a job, also for some minutes after its end; None if SLURM does not answer."""
    done = _run_slurm_command(["squeue", f"--jobs={job_id}", "--states=all", "--noheader", "--format=%T|%r|%N"])
    if done is None:
        return None
    if done.returncode == 0 and (fields := done.stdout.strip().split("|"))[0]:
        return JobState(*fields)
    if done.returncode == 0 or "Invalid job id" in done.stderr:
        return JobState(_accounted_state(job_id))
    return None


def _accounted_state(job_id: int) -> str:
    """Return the state of a job that is no longer in the queue."""
    command = ["sacct", f"--jobs={job_id}", "--allocations", "--noheader", "--parsable2", "--format=State"]
    done = _run_slurm_command(command)
    fields = done.stdout.split() if done is not None and done.returncode == 0 else []  # such as CANCELLED by 1000
    return fields[0] if fields else "UNKNOWN"


def queued_jobs() -> dict[str, str] | None:
    """Return the states of this user's active jobs by job id; None without SLURM, or if it does not answer."""
    if shutil.which("squeue") is None:
        return None
    done = _run_slurm_command(["squeue", "--me", "--noheader", "--format=%A|%T"])
    if done is None or done.returncode != 0:
        return None
    return dict(line.strip().split("|", 1) for line in done.stdout.splitlines() if "|" in line)


def _run_slurm_command(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    """Run a SLURM command; None if it is not installed or does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def scancel(job: str) -> None:
    """Cancel a job, or a step of it (`123.0`)."""
    try:
        done = subprocess.run(["scancel", job], capture_output=True, text=True, timeout=_SLURM_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"job {job}: scancel does not answer ({error}); run it where SLURM is") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"job {job}: scancel refuses ({reason}); see squeue")
