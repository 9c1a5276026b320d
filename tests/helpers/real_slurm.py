"""What tests on a real SLURM cluster share: whether there can be one here, its ports, and waiting."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


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


def free_ports(nodes: int) -> int:
    """The first of 300 ports for a cluster; others may look for theirs at the same time."""
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
    """What it returns when that is true."""
    end = time.monotonic() + within_s
    while not (result := condition()):
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.1)
    return result
