"""Helpers for tests on a real SLURM cluster: whether this machine can run one, its ports, and waiting."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def slurm_unavailable() -> str | None:
    """Return why this machine cannot run a cluster, or None if it can.

    Raises:
        RuntimeError: it cannot, and QLORA_DIST_REQUIRE_LAUNCHERS is 1.
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
    """Return the first of 300 free ports. The search starts at a place that depends on the process."""
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


def wait_for(condition: Callable[[], _T], within_s: float) -> _T:
    """Return a condition's first true value."""
    end = time.monotonic() + within_s
    while not (result := condition()):
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.1)
    return result
