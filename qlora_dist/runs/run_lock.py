"""Holding a run's folder: one run writes there at a time, and rank 0 holds the lease for it.

    run.lock       the lease: host, process, and a heartbeat every five seconds
    run.lock.json  which launch the holder belongs to, so that its own restart need not wait

A holder that is dead loses its lease: at once on its own host, and to a restart of its own launch; to others when no
heartbeat has come for `LEASE_DURATION_S` seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import LeaseCompromise, LeaseSettingsMismatch, OwnerRecord, SoftFileLease, Timeout

from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import is_same_launch, launch_id
from qlora_dist.runtime.lease import LEASE_DURATION_S, LeaseMonitor, make_lease, owner_host
from qlora_dist.runtime.user_error_file import write_user_error_file

LOCK_FILE = "run.lock"
_LAUNCH_FILE = "run.lock.json"
_LOCK_POLL_S = 0.2
_WAIT_NOTICE_S = 2.0
"""Seconds of waiting before the line that says so."""


@contextmanager
def lock_run_dir(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder of a run. Called on rank 0.

    Args:
        path: the run's folder; made if it is not there, and removed again if it is then empty at the end.
        log: called with a line if a holder has to be waited for that may be dead.

    Raises:
        UserError: another run holds it and lives, or the folder cannot be written.
    """
    lease = make_lease(path / LOCK_FILE, lambda loss: _exit_on_lost_lease(path, loss))
    created_dirs = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        _acquire(path, lease, log)
    except (OSError, LeaseSettingsMismatch) as error:
        reason = getattr(error, "strerror", None) or "it is another program's"
        raise UserError(
            f"{path / LOCK_FILE}: cannot be written ({reason}); mend that, or give run.name another value"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            (path / _LAUNCH_FILE).unlink(missing_ok=True)
            lease.release()
            for folder in created_dirs:
                folder.rmdir()  # an empty one: the start has failed


def _acquire(path: Path, lease: SoftFileLease, log: Callable[[str], None]) -> None:
    monitor, since, has_said = LeaseMonitor(lease), time.monotonic(), False
    while True:
        try:
            lease.acquire(blocking=False)
            break
        except Timeout:
            owner = monitor.look()
        if owner is not None and _is_our_launch(path, owner):
            lease.break_lock()  # the launcher has ended it, or is about to
            continue
        if owner is not None and monitor.has_heartbeat:
            raise UserError(
                f"{path}: another run is at work in it (process {owner.pid} on {owner_host(owner)}); wait for its end, "
                f"stop it with `qlora-dist cancel {path.name}`, or give run.name another value"
            )
        if owner is not None and not has_said and time.monotonic() - since > _WAIT_NOTICE_S:
            has_said = True
            log(
                f"{path}: process {owner.pid} on {owner_host(owner)} holds it; waiting for a heartbeat of it, at most "
                f"{LEASE_DURATION_S:.0f} s"
            )
        time.sleep(_LOCK_POLL_S)
    note = {"token": lease.token, "launch": launch_id()}
    partial = path / f"{_LAUNCH_FILE}.partial"
    partial.write_text(json.dumps(note) + "\n", encoding="utf-8")
    partial.replace(path / _LAUNCH_FILE)


def _is_our_launch(path: Path, owner: OwnerRecord) -> bool:
    """Return whether the holder is an earlier start of this process's own launch."""
    try:
        note: Any = json.loads((path / _LAUNCH_FILE).read_text(encoding="utf-8"))
        return note["token"] == owner.token and is_same_launch(note["launch"], launch_id())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _exit_on_lost_lease(path: Path, loss: LeaseCompromise) -> None:
    """End this process if another one has taken its lease: it was taken for dead, and both would write."""
    if loss.reason != "owner-changed":
        return  # the lease's file was removed, or the file system does not answer: no other process writes
    error = UserError(
        f"{path}: another run has taken it over, because this one gave no sign of life for {LEASE_DURATION_S:.0f} s; this one "
        "ends"
    )
    write_user_error_file(error)
    print(f"qlora-dist: {error}", file=sys.stderr, flush=True)
    os._exit(2)
