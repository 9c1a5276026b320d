"""SLURM's queue, as far as runs need it."""

from __future__ import annotations

import shutil
import subprocess

from qlora_dist.errors import UserError

_ANSWER_S = 20.0
"""A client whose controller is gone tries for minutes."""
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "SPECIAL_EXIT")


def queued_jobs() -> dict[str, str] | None:
    """State by job id of this user's jobs that have not ended; None: there is no SLURM, or it doesn't answer."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--me", "--noheader", "--format=%A|%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return dict(line.strip().split("|", 1) for line in done.stdout.splitlines() if "|" in line)


def scancel(job: str) -> None:
    """End a job, or a step (`123.0`) of it.

    Raises:
        UserError: SLURM refuses.
    """
    try:
        done = subprocess.run(["scancel", job], capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"job {job}: scancel does not answer ({error}); run it where SLURM is") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"job {job}: scancel refuses ({reason}); see squeue")
