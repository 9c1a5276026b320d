"""SLURM's queue, as far as runs need it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from qlora_dist.errors import UserError

_SLURM_TIMEOUT_S = 20.0
"""A client whose controller is gone tries for minutes."""
WAITING_STATES = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "SPECIAL_EXIT")
_ENDED_STATES = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY"),
    *("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED", "UNKNOWN"),
)


@dataclass(frozen=True)
class JobState:
    """How a job is."""

    state: str
    """SLURM's word, such as PENDING; UNKNOWN: the job has ended, and nobody knows how."""
    reason: str = ""
    """Why it waits."""
    nodes: str = ""
    """As SLURM names them."""

    @property
    def has_ended(self) -> bool:
        """Whether it will do nothing more."""
        return self.state in _ENDED_STATES


def job_state(job_id: int) -> JobState | None:
    """How a job is, or how it has ended, which SLURM knows for some minutes; None: it doesn't answer."""
    command = ["squeue", f"--jobs={job_id}", "--states=all", "--noheader", "--format=%T|%r|%N"]
    done = _run_slurm_command(command)
    if done is None:
        return None
    if done.returncode == 0 and (fields := done.stdout.strip().split("|"))[0]:
        return JobState(*fields)
    if done.returncode == 0 or "Invalid job id" in done.stderr:
        return JobState(_accounted_state(job_id))
    return None


def _accounted_state(job_id: int) -> str:
    """Of a job that the queue has forgotten."""
    command = ["sacct", f"--jobs={job_id}", "--allocations", "--noheader", "--parsable2", "--format=State"]
    done = _run_slurm_command(command)
    words = done.stdout.split() if done is not None and done.returncode == 0 else []  # such as CANCELLED by 1000
    return words[0] if words else "UNKNOWN"


def queued_jobs() -> dict[str, str] | None:
    """State by job id of this user's jobs that have not ended; None: there is no SLURM, or it doesn't answer."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--me", "--noheader", "--format=%A|%T"]
    done = _run_slurm_command(command)
    if done is None or done.returncode != 0:
        return None
    return dict(line.strip().split("|", 1) for line in done.stdout.splitlines() if "|" in line)


def _run_slurm_command(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    """What SLURM says; None: it is not there, or doesn't answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def scancel(job: str) -> None:
    """End a job, or a step (`123.0`) of it.

    Raises:
        UserError: SLURM refuses.
    """
    try:
        done = subprocess.run(["scancel", job], capture_output=True, text=True, timeout=_SLURM_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"job {job}: scancel does not answer ({error}); run it where SLURM is") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"job {job}: scancel refuses ({reason}); see squeue")
