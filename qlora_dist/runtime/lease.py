"""Leases: a file that names the process which may write somewhere, and which a dead process loses. No torch.

Exclusive creation of a file and renaming are all that a lease needs, and NFS and Lustre have both.
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
    """Return the lease whose file is `path`. Nobody holds it yet.

    Args:
        path: the lease's file.
        on_loss: called from a thread when this process held the lease and has lost it.
    """
    return SoftFileLease(
        path, lease_duration=LEASE_DURATION_S, heartbeat_interval=LEASE_HEARTBEAT_S, on_compromise=on_loss
    )


class LeaseMonitor:
    """Observer of a lease that another process holds. One object for the whole wait: it remembers the heartbeats."""

    def __init__(self, lease: SoftFileLease) -> None:
        self._lease = lease
        self._sign: tuple[str | None, int] | None = None
        self._last_heartbeat_at = time.monotonic()
        self.has_heartbeat = False
        """Whether the holder has given a heartbeat since the first look."""

    def look(self) -> OwnerRecord | None:
        """Return the holder, and break its lease if it is dead.

        filelock leaves some leases alone. It has to where two names cannot be exchanged (NFS, Lustre), and does where a
        holder was killed before it wrote its own. Two processes that break a lease at the same moment may both get it.
        """
        owner = self._lease.owner
        try:
            heartbeat = (owner and owner.token, Path(self._lease.lock_file).stat().st_mtime_ns)
        except FileNotFoundError:
            return owner
        if heartbeat != self._sign:
            same_holder = self._sign is not None and owner is not None and self._sign[0] == owner.token
            self.has_heartbeat = same_holder
            self._sign, self._last_heartbeat_at = heartbeat, time.monotonic()
        if time.monotonic() - self._last_heartbeat_at > LEASE_DURATION_S + LEASE_HEARTBEAT_S or (
            owner is not None and _has_ended(owner)
        ):
            self._lease.break_lock()
        return owner


def _has_ended(owner: OwnerRecord) -> bool:
    """Return whether a holder has certainly ended: it ran on this host, and its process is gone or a zombie.

    In a container the host's name has an addition, and nothing is certain.
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
    """Return the holder's host without the addition that names a container's namespace."""
    return owner.hostname.partition("?")[0]
