"""Leases: files that name the process which may write to a folder. A dead process loses its lease.

A lease needs only exclusive creation of a file and renaming, which NFS and Lustre both support.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from filelock import LeaseCompromise, OwnerRecord, SoftFileLease

LEASE_DURATION_S = 45.0
"""Seconds without a heartbeat after which a holder counts as dead. A holder on this host counts as dead as soon as its
process is gone. All processes that share a file system must agree on it."""
LEASE_HEARTBEAT_S = 5.0
"""Seconds between two heartbeats of a holder."""


def make_lease(path: Path, on_loss: Callable[[LeaseCompromise], None] | None = None) -> SoftFileLease:
    """Return the lease whose file is `path`, without acquiring it. A thread calls `on_loss` if a held lease is lost."""
    return SoftFileLease(
        path, lease_duration=LEASE_DURATION_S, heartbeat_interval=LEASE_HEARTBEAT_S, on_compromise=on_loss
    )


class LeaseMonitor:
    """Observer of a lease that another process holds. It remembers heartbeats, so use one object for the whole wait."""

    def __init__(self, lease: SoftFileLease) -> None:
        self._lease = lease
        self._last_heartbeat: tuple[str | None, int] | None = None
        self._last_heartbeat_at = time.monotonic()
        self.has_heartbeat = False
        """True if the holder has given a heartbeat since the first call of `check_holder`."""

    def check_holder(self) -> OwnerRecord | None:
        """Return the holder, and break its lease if it is dead.

        filelock itself breaks no lease on NFS and Lustre, which cannot exchange two names. It breaks none either if the
        holder was killed before it wrote its name. Two processes that break a lease at the same time may both get it.
        """
        owner = self._lease.owner
        try:
            heartbeat = (owner and owner.token, Path(self._lease.lock_file).stat().st_mtime_ns)
        except FileNotFoundError:
            return owner
        if heartbeat != self._last_heartbeat:
            previous = self._last_heartbeat
            self.has_heartbeat = previous is not None and owner is not None and previous[0] == owner.token
            self._last_heartbeat, self._last_heartbeat_at = heartbeat, time.monotonic()
        if time.monotonic() - self._last_heartbeat_at > LEASE_DURATION_S + LEASE_HEARTBEAT_S or (
            owner is not None and _has_ended(owner)
        ):
            self._lease.break_lock()
        return owner


def _has_ended(owner: OwnerRecord) -> bool:
    """Return whether a holder has certainly ended: it ran on this host, and its process is gone or a zombie.

    In a container the host's name has a suffix, so that the comparison fails and the holder counts as alive.
    """
    if owner.hostname != socket.gethostname():
        return False
    try:
        os.kill(owner.pid, 0)
        return psutil.Process(owner.pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return True
    except (PermissionError, psutil.Error):
        return False


def owner_host(owner: OwnerRecord) -> str:
    """Return the holder's host without the suffix that names a container's namespace."""
    return owner.hostname.partition("?")[0]
