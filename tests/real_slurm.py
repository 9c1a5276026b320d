"""Whether a real SLURM cluster can be started here."""

from __future__ import annotations

import os
import shutil


def slurm_unavailable() -> str | None:
    """Why it can't be; None: it can. Where QLORA_DIST_REQUIRE_LAUNCHERS is 1, that is a failure.

    Raises:
        RuntimeError: it is required and can't be.
    """
    reason = None
    if not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch")):
        reason = "SLURM is not installed: run slurm/local_cluster.sh install"
    elif os.geteuid() != 0:
        reason = "a cluster of several nodes on one machine needs root"
    if reason is not None and os.environ.get("QLORA_DIST_REQUIRE_LAUNCHERS") == "1":
        raise RuntimeError(reason)
    return reason
