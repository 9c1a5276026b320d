"""A cache entry that one process prepares while all others wait for it, without `torch.distributed`.

It works on NFS and Lustre, because it needs only exclusive creation of a file and renaming. Nodes with separate caches
prepare one entry each.

- `NAME/` is the entry. It gets its name only once it is complete, with the sizes and checksums of its files.
- `NAME.checked` lists the files whose checksums have been verified, so that one process per start verifies them.
- `NAME.lock` names the process that prepares the entry. That process refreshes the lock while it lives.
- `NAME.partial-*` is the entry while it is being prepared.
- `NAME.failed` is the error message for the processes that wait.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import SoftFileLease, Timeout

from qlora_dist.data.entry_manifest import (
    find_changed_file,
    is_entry_complete,
    record_verification,
    was_verified,
    write_entry_manifest,
)
from qlora_dist.errors import UserError
from qlora_dist.runtime.lease import LeaseMonitor, make_lease, owner_host

LogFn = Callable[[str], None]

_POLL_RANGE_S = (0.05, 2.0)
"""Least and most seconds between two reads of the lock; in between, a tenth of the time waited so far."""
_WAIT_LOG_INTERVALS_S = (2.0, 30.0)
"""Seconds of waiting before the first message, and between later ones."""
PROGRESS_FILE = "progress"
"""Name of a file with a progress message for waiting processes. `create` may write it; it is not part of the entry."""


def get_or_create_entry(
    entry: Path, create: Callable[[Path], None], log: LogFn, validate: Callable[[Path], object] = lambda entry: None
) -> Path:
    """Return the entry; if it is missing or damaged, exactly one of the calling processes creates it.

    One process per start verifies the checksums of an existing entry and creates it again if they differ. A lock holder
    that was only suspended, but is taken for dead, does no harm. Each process writes into a folder of its own, and the
    first complete folder gets the name.

    Args:
        entry: folder of the entry. Its name identifies its content.
        create: function that fills the empty folder that it is given.
        log: function that prints a message when the entry is damaged, and from time to time while waiting.
        validate: function that reads the entry and raises an error if `create` did not write it.

    Raises:
        UserError: raised by `create`, in its process and in all that waited for it; or the cache cannot be written.
    """
    if _is_verified(entry):
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _create_or_wait(entry, create, log, validate)
    except OSError as error:
        if _find_damage(entry, validate) is not None:
            raise _unwritable_cache_error(entry, error) from None
    return entry  # After an OSError, the user cannot write to this cache, but the entry is intact.


def _is_verified(folder: Path) -> bool:
    return was_verified(folder, _sibling_path(folder, "checked"))


def _find_damage(folder: Path, validate: Callable[[Path], object]) -> str | None:
    if not is_entry_complete(folder):
        return "a file is missing, or has another size"
    try:
        if (name := find_changed_file(folder)) is not None:
            return f"the content of {name} has changed"
        validate(folder)
    except Exception as error:  # Foreign content can make the readers of these formats raise anything.
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def remove_entry(folder: Path) -> None:
    """Remove an entry if it exists. Its name is free at once, and processes that have its files open keep them."""
    doomed = _partial_path(folder)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(doomed)
    if doomed.is_symlink():  # Its target is not part of the cache.
        doomed.unlink()
    shutil.rmtree(doomed, ignore_errors=True)


def _create_or_wait(
    folder: Path, create: Callable[[Path], None], log: LogFn, validate: Callable[[Path], object]
) -> None:
    # One object for the whole wait, because it remembers when the holder last refreshed the lock.
    lock = make_lease(_sibling_path(folder, "lock"))
    waiting = _EntryWaiter(folder, lock, log)
    while not _is_verified(folder):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            waiting.poll_lock()
            waiting.raise_if_failed()
            waiting.sleep()
            continue
        try:
            if _is_verified(folder):  # It may be by now.
                return
            damage = _find_damage(folder, validate)
            if damage is not None:
                waiting.raise_if_failed()
                if os.path.lexists(folder):
                    log(f"{folder}: is damaged ({damage}), so it is created again")
                _create_entry(folder, create, lock)
            if is_entry_complete(folder):  # Otherwise, another process has taken over and has not finished.
                record_verification(folder, _sibling_path(folder, "checked"))
                return
        finally:
            lock.release()


def _create_entry(folder: Path, create: Callable[[Path], None], lock: SoftFileLease) -> None:
    """Create the entry. It is missing afterwards if another process has taken over and has not finished."""
    remove_entry(folder)
    for stale_partial in folder.parent.glob(f"{folder.name}.partial-*"):
        remove_entry(stale_partial)  # It renames first, so that a slow writer cannot continue.
    partial = _sibling_path(folder, f"partial-{lock.token}")
    partial.mkdir()
    try:
        try:
            create(partial)
            _commit(partial, folder)
        except OSError as error:
            if not partial.exists():  # Another process has taken over and removed it.
                return
            raise _unwritable_cache_error(folder, error) from None
    except UserError as error:
        remove_entry(partial)  # This comes before the message is written, because the disk may be full.
        _write_failure(folder, lock.token, str(error))
        raise
    except BaseException:
        remove_entry(partial)
        raise
    _sibling_path(folder, "failed").unlink(missing_ok=True)


def _commit(partial: Path, folder: Path) -> None:
    """Give the folder its final name once all its files are on disk, the manifest last."""
    (partial / PROGRESS_FILE).unlink(missing_ok=True)
    for path in write_entry_manifest(partial):
        _sync(path)
    with contextlib.suppress(OSError):  # Some file systems cannot synchronize folders.
        _sync(partial)
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if is_entry_complete(folder):  # A process that was taken for dead finished first.
            remove_entry(partial)
        else:
            remove_entry(folder)
            partial.rename(folder)
    with contextlib.suppress(OSError):
        _sync(folder.parent)


def _write_failure(folder: Path, token: str | None, message: str) -> None:
    """Write the error message for the waiting processes. If that fails too, they try to create the entry themselves."""
    partial = _partial_path(folder)
    with contextlib.suppress(OSError):
        try:
            partial.write_text(json.dumps({"token": token, "sentence": message}), encoding="utf-8")
            partial.rename(_sibling_path(folder, "failed"))
        finally:
            partial.unlink(missing_ok=True)


class _EntryWaiter:
    """A wait of this process for an entry that another process creates."""

    def __init__(self, folder: Path, lock: SoftFileLease, log: LogFn) -> None:
        self._folder = folder
        self._watch = LeaseMonitor(lock)
        self._log = log
        self._seen_tokens: set[str | None] = set()
        self._start_s = time.monotonic()
        self._next_line_s = _WAIT_LOG_INTERVALS_S[0]

    def poll_lock(self) -> None:
        # If it breaks a successor's lock, there are two holders, which does no harm.
        owner = self._watch.check_holder()
        if owner is None:
            return
        self._seen_tokens.add(owner.token)
        waited_s = time.monotonic() - self._start_s
        if waited_s >= self._next_line_s:
            self._next_line_s = waited_s + _WAIT_LOG_INTERVALS_S[1]
            note = self._read_progress(owner.token)
            self._log(
                f"waiting for {owner_host(owner)}, process {owner.pid}, to prepare {self._folder} "
                f"({waited_s:.0f} s{note})"
            )

    def _read_progress(self, token: str | None) -> str:
        with contextlib.suppress(OSError):
            return f"; {(_sibling_path(self._folder, f'partial-{token}') / PROGRESS_FILE).read_text(encoding='utf-8')}"
        return ""

    def raise_if_failed(self) -> None:
        """Raise the error of a process that this one has waited for. Older failures are ignored."""
        try:
            failure: dict[str, Any] = json.loads(_sibling_path(self._folder, "failed").read_text(encoding="utf-8"))
            token, message = failure["token"], failure["sentence"]
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return
        if token in self._seen_tokens:
            raise UserError(message)

    def sleep(self) -> None:
        least, most = _POLL_RANGE_S
        waited_s = time.monotonic() - self._start_s
        time.sleep(min(max(waited_s / 10, least), most) * random.uniform(0.5, 1.0))


def _sibling_path(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")


def _partial_path(folder: Path) -> Path:
    return _sibling_path(folder, f"partial-{secrets.token_hex(8)}")


def _unwritable_cache_error(folder: Path, error: OSError) -> UserError:
    reason = str(error.strerror or error).split("\n")[0]
    return UserError(
        f"{folder.parent}: the cache cannot be written ({reason}); free space there, or give data.cache another folder"
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
