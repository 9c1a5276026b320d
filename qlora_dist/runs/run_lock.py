"""Lock of a run's folder. One run writes to the folder at a time, and its rank 0 holds the lease.

`run.lock` is the lease, with host, process and a heartbeat every five seconds. `run.lock.json` names the launch of the
holder, so that a restart of the same launch need not wait.

A dead holder loses its lease at once to processes of its own host and to a restart of its launch. Other processes wait
until the last heartbeat is `LEASE_DURATION_S` seconds old.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import LeaseCompromise, LeaseSettingsMismatch, OwnerRecord, SoftFileLease, Timeout

from qlora_dist.errors import UserError
from qlora_dist.runs.json_object import read_json_object
from qlora_dist.runtime.environment import is_same_launch, launch_id
from qlora_dist.runtime.lease import LEASE_DURATION_S, LeaseMonitor, make_lease, owner_host
from qlora_dist.runtime.process_exit import write_user_error_file

LOCK_FILE = "run.lock"
_LAUNCH_FILE = "run.lock.json"
_LOCK_POLL_S = 0.2
_WAIT_NOTICE_S = 2.0
"""Seconds of waiting before a message about it."""


@contextmanager
def lock_run_dir(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a run's folder. Call it on rank 0.

    The folder is created if necessary, and removed again if it is empty at the end. `log` receives a message about
    waiting for a holder that may be dead.

    Raises:
        UserError: a running run holds the lock, or the folder cannot be written.
    """
    lease = make_lease(path / LOCK_FILE, lambda loss: _exit_on_lost_lease(path, loss))
    created_dirs = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        _acquire(path, lease, log)
    except (OSError, LeaseSettingsMismatch) as error:
        reason = getattr(error, "strerror", None) or "it belongs to another program"
        raise UserError(
            f"{path / LOCK_FILE}: cannot be written ({reason}); fix that, or give run.name another value"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            (path / _LAUNCH_FILE).unlink(missing_ok=True)
            lease.release()
            for folder in created_dirs:
                folder.rmdir()  # succeeds only for an empty folder, after a failed start


def _acquire(path: Path, lease: SoftFileLease, log: Callable[[str], None]) -> None:
    monitor, since, has_logged = LeaseMonitor(lease), time.monotonic(), False
    while True:
        try:
            lease.acquire(blocking=False)
            break
        except Timeout:
            owner = monitor.check_holder()
        if owner is not None and _is_our_launch(path, owner):
            lease.break_lock()  # the launcher has ended the holder, or is about to
            continue
        if owner is not None and monitor.has_heartbeat:
            raise UserError(
                f"{path}: another run uses this folder (process {owner.pid} on {owner_host(owner)}); wait for its end, "
                f"stop it with `qlora-dist cancel {path.name}`, or give run.name another value"
            )
        if owner is not None and not has_logged and time.monotonic() - since > _WAIT_NOTICE_S:
            has_logged = True
            log(
                f"{path}: locked by process {owner.pid} on {owner_host(owner)}; waiting up to {LEASE_DURATION_S:.0f} s "
                "for its heartbeat"
            )
        time.sleep(_LOCK_POLL_S)
    note = {"token": lease.token, "launch": launch_id()}
    partial = path / f"{_LAUNCH_FILE}.partial"
    partial.write_text(json.dumps(note) + "\n", encoding="utf-8")
    partial.replace(path / _LAUNCH_FILE)


def _is_our_launch(path: Path, owner: OwnerRecord) -> bool:
    """Return whether the holder is an earlier start of this process's own launch."""
    note = read_json_object(path / _LAUNCH_FILE)
    return note.get("token") == owner.token and is_same_launch(note.get("launch"), launch_id())


def _exit_on_lost_lease(path: Path, loss: LeaseCompromise) -> None:
    """End this process if another one has taken its lease, because both would write to the folder."""
    if loss.reason != "owner-changed":
        return  # the lease's file was removed, or the file system does not answer; no other process writes
    error = UserError(
        f"{path}: another run has taken over this folder, because this run gave no heartbeat for "
        f"{LEASE_DURATION_S:.0f} s; this run ends"
    )
    write_user_error_file(error)
    print(f"qlora-dist: {error}", file=sys.stderr, flush=True)
    os._exit(2)
