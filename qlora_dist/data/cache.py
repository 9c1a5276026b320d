"""What one process prepares and all others wait for, without torch.distributed: a folder that is complete or not there.

It works wherever the cache lies: exclusive creation of a file and renaming are all it needs, and NFS and Lustre have
both. Nodes with a cache of their own prepare one each.

    NAME/           the entry, under its name only once it is complete, with the sizes and sums of its files
    NAME.checked    which files of it have been compared with their sums, so that one process of a start does so
    NAME.lock       who prepares it; refreshed while that process lives
    NAME.partial-*  what it has so far
    NAME.failed     what went wrong, for those who wait
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
"""Least and most seconds between two looks at the lock; a tenth of what has been waited already."""
_WAIT_LOG_INTERVALS_S = (2.0, 30.0)
"""Seconds of waiting before the first line, and between the others."""
PROGRESS_FILE = "progress"
"""A file that `make` may write: a line for those who wait. It is no part of the entry."""


def get_or_create_entry(
    entry: Path, create: Callable[[Path], None], log: LogFn, validate: Callable[[Path], object] = lambda entry: None
) -> Path:
    """The entry `entry`, made by `create` unless it is there; by one process, however many ask for it at a time.

    An entry that is there is compared with its sums first, by one process for all that start within some minutes, and
    made anew if it differs. A holder that others take for dead, but that was only stopped for long, does no harm: each
    writes into a folder of its own, and the one that is complete first gets the name.

    Args:
        entry: the entry. Its name says what is in it: the same name, the same content.
        create: fills the folder it is given, which is there and empty.
        log: told that the entry is damaged, and now and then for whom this process waits.
        validate: reads the entry, and raises an error if it is not of the kind that `create` writes.

    Returns:
        `entry`.

    Raises:
        UserError: `create`'s own, in the process that called it and in all that were waiting for that one; or the cache
            cannot be written.
    """
    if _is_verified(entry):
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _create_or_wait(entry, create, log, validate)
    except OSError as error:
        if _find_damage(entry, validate) is not None:
            raise _unwritable_cache_error(entry, error) from None
    return entry  # after an OSError: of a cache that this user cannot write


def _is_verified(folder: Path) -> bool:
    return was_verified(folder, _sibling_path(folder, "checked"))


def _find_damage(folder: Path, read: Callable[[Path], object]) -> str | None:
    """Say what is wrong with an entry; None: nothing."""
    if not is_entry_complete(folder):
        return "a file is missing, or has another size"
    try:
        if (name := find_changed_file(folder)) is not None:
            return f"the content of {name} has changed"
        read(folder)
    except Exception as error:  # whatever foreign content does to the readers of these formats
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def remove_entry(folder: Path) -> None:
    """Remove an entry, if it is there. Its name is free at once; who has its files open keeps them."""
    doomed = _partial_path(folder)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(doomed)
    if doomed.is_symlink():  # planted: what it points to is not the cache's
        doomed.unlink()
    shutil.rmtree(doomed, ignore_errors=True)


def _create_or_wait(folder: Path, make: Callable[[Path], None], say: LogFn, read: Callable[[Path], object]) -> None:
    # one object for the whole wait: it remembers since when the holder has given no sign of life
    lock = make_lease(_sibling_path(folder, "lock"))
    waiting = _EntryWaiter(folder, lock, say)
    while not _is_verified(folder):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            waiting.look()
            waiting.raise_if_failed()
            waiting.sleep()
            continue
        try:
            if _is_verified(folder):  # by now
                return
            damage = _find_damage(folder, read)
            if damage is not None:
                waiting.raise_if_failed()
                if os.path.lexists(folder):
                    say(f"{folder}: is damaged ({damage}), and made anew")
                _create_entry(folder, make, lock)
            if is_entry_complete(folder):  # else another process has taken over and is not done
                record_verification(folder, _sibling_path(folder, "checked"))
                return
        finally:
            lock.release()


def _create_entry(folder: Path, make: Callable[[Path], None], lock: SoftFileLease) -> None:
    """Make the entry; it is not there afterwards if another process has taken over and is not done."""
    remove_entry(folder)
    for stale_partial in folder.parent.glob(f"{folder.name}.partial-*"):
        remove_entry(stale_partial)  # renamed first: one that is slow and not dead finds no folder to go on in
    partial = _sibling_path(folder, f"partial-{lock.token}")
    partial.mkdir()
    try:
        try:
            make(partial)
            _commit(partial, folder)
        except OSError as error:
            if not partial.exists():  # another process has taken over, and cleaned up
                return
            raise _unwritable_cache_error(folder, error) from None
    except UserError as error:
        remove_entry(partial)  # before the sentence is written: the disk may be full
        _write_failure(folder, lock.token, str(error))
        raise
    except BaseException:
        remove_entry(partial)
        raise
    _sibling_path(folder, "failed").unlink(missing_ok=True)


def _commit(partial: Path, folder: Path) -> None:
    """Give the folder its name when all of it is on the disk, its manifest last."""
    (partial / PROGRESS_FILE).unlink(missing_ok=True)
    for path in write_entry_manifest(partial):
        _sync(path)
    with contextlib.suppress(OSError):  # not every file system lets folders be synchronized
        _sync(partial)
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if is_entry_complete(folder):  # a process that we had taken for dead was first
            remove_entry(partial)
        else:
            remove_entry(folder)
            partial.rename(folder)
    with contextlib.suppress(OSError):
        _sync(folder.parent)


def _write_failure(folder: Path, token: str | None, sentence: str) -> None:
    """Tell the others. If that fails too, they find out for themselves."""
    written = _partial_path(folder)
    with contextlib.suppress(OSError):
        try:
            written.write_text(json.dumps({"token": token, "sentence": sentence}), encoding="utf-8")
            written.rename(_sibling_path(folder, "failed"))
        finally:
            written.unlink(missing_ok=True)


class _EntryWaiter:
    """One process's wait for another's entry."""

    def __init__(self, folder: Path, lock: SoftFileLease, say: LogFn) -> None:
        self._folder = folder
        self._watch = LeaseMonitor(lock)
        self._say = say
        self._seen_tokens: set[str | None] = set()
        self._since = time.monotonic()
        self._next_line_s = _WAIT_LOG_INTERVALS_S[0]

    def look(self) -> None:
        """Remember who holds the lock, say so now and then, and break it if that process is gone."""
        owner = self._watch.check_holder()  # breaking a successor's lock gives two holders, which is harmless
        if owner is None:
            return
        self._seen_tokens.add(owner.token)
        waited_s = time.monotonic() - self._since
        if waited_s >= self._next_line_s:
            self._next_line_s = waited_s + _WAIT_LOG_INTERVALS_S[1]
            note = self._note(owner.token)
            self._say(
                f"waiting for {owner_host(owner)}, process {owner.pid}, to prepare {self._folder} ({waited_s:.0f} s{note})"
            )

    def _note(self, token: str | None) -> str:
        with contextlib.suppress(OSError):
            return f"; {(_sibling_path(self._folder, f'partial-{token}') / PROGRESS_FILE).read_text(encoding='utf-8')}"
        return ""

    def raise_if_failed(self) -> None:
        """Raise what a process raised that this one has waited for; an older failure is none of its business."""
        try:
            failure: dict[str, Any] = json.loads(_sibling_path(self._folder, "failed").read_text(encoding="utf-8"))
            token, sentence = failure["token"], failure["sentence"]
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return
        if token in self._seen_tokens:
            raise UserError(sentence)

    def sleep(self) -> None:
        """Sleep, the longer the longer it takes, and not in step with others."""
        least, most = _POLL_RANGE_S
        waited_s = time.monotonic() - self._since
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
