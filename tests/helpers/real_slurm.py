"""Helpers of tests on a real SLURM cluster: whether one can run here, and its ports."""

from __future__ import annotations

import os
import shutil
import socket


def slurm_unavailable() -> str | None:
    """Return the reason why no cluster can run here; None if one can.

    Raises:
        RuntimeError: no cluster can run, and QLORA_DIST_REQUIRE_LAUNCHERS is 1.
    """
    reason = None
    if not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch")):
        reason = "SLURM is not installed: run slurm/local_cluster.sh install"
    elif os.geteuid() != 0:
        reason = "a cluster of several nodes on one machine needs root"
    if reason is not None and os.environ.get("QLORA_DIST_REQUIRE_LAUNCHERS") == "1":
        raise RuntimeError(reason)
    return reason


def free_ports(nodes: int) -> int:
    """Return the first of 300 free ports for a cluster. Other processes may search at the same time."""
    first = os.getpid() % 40
    for number in range(first, first + 40):
        port = 16800 + number % 40 * 300
        if all(map(_is_free, range(port, port + nodes + 1))):
            return port
    raise RuntimeError("no free ports for a SLURM cluster")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
