"""Manifest of a cache entry: sizes and checksums of its files, and their verification."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

ENTRY_MANIFEST_FILE = "entry.json"
"""Name of the file that holds the size of every other file of the entry."""
ENTRY_CHECKSUMS_FILE = "sums.json"
"""Name of the file that holds the SHA-256 of the other files. Entries of an earlier version lack it, so only their
sizes are compared."""
_HASHED_BLOCK_BYTES = 2**20
_VERIFICATION_VALID_S = 600.0
"""Seconds for which a verification is valid if the files do not change, so that the ranks of a start share one."""


def write_entry_manifest(folder: Path) -> list[Path]:
    """Write checksums and sizes of all files in `folder`. Return all files, these two last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): sha256_hexdigest(path) for path in files}
    (folder / ENTRY_CHECKSUMS_FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
    files.append(folder / ENTRY_CHECKSUMS_FILE)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / ENTRY_MANIFEST_FILE).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    return [*files, folder / ENTRY_MANIFEST_FILE]


def is_entry_complete(folder: Path) -> bool:
    """Return whether the entry exists and every file has the size that was recorded."""
    return entry_file_stats(folder) is not None


def entry_file_stats(folder: Path) -> list[list[Any]] | None:
    """Return name, size, inode and times of each file; None if the entry is incomplete.

    Any change of a file alters one of these values.
    """
    sizes = _strings_to(_read(folder / ENTRY_MANIFEST_FILE), int)
    stats: list[list[Any]] = []
    for name, size in (sizes or {}).items():
        try:
            stat = (folder / name).stat()
        except (OSError, ValueError):
            return None
        if stat.st_size != size:
            return None
        stats.append([name, size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns])
    return stats or None


def find_changed_file(folder: Path) -> str | None:
    """Return the name of a file whose content differs from its checksum; None if there is none."""
    sizes = _strings_to(_read(folder / ENTRY_MANIFEST_FILE), int) or {}
    if ENTRY_CHECKSUMS_FILE not in sizes:
        return None
    sums = _strings_to(_read(folder / ENTRY_CHECKSUMS_FILE), str) or {}
    for name in sizes:
        if name != ENTRY_CHECKSUMS_FILE and (name not in sums or sha256_hexdigest(folder / name) != sums[name]):
            return name
    return None


def record_verification(folder: Path, record_path: Path) -> None:
    partial = record_path.with_name(f"{record_path.name}.{os.getpid()}")
    with suppress(OSError):  # If it fails, the next process verifies the entry too.
        try:
            partial.write_text(json.dumps(entry_file_stats(folder)), encoding="utf-8")
            partial.rename(record_path)
        finally:
            partial.unlink(missing_ok=True)


def was_verified(folder: Path, record_path: Path) -> bool:
    """Return whether these very files were verified a short time ago."""
    try:
        age_s = time.time() - record_path.stat().st_mtime
    except OSError:
        return False
    return (
        abs(age_s) < _VERIFICATION_VALID_S
        and (now := entry_file_stats(folder)) is not None
        and _read(record_path) == now
    )


def sha256_hexdigest(path: Path) -> str:
    """Return the SHA-256 of a file in hex. It is read in blocks, while other threads run.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_HASHED_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _strings_to(tree: Any, kind: type) -> dict[str, Any] | None:
    """Return `tree` if it maps names of files within the entry to values of this type, else None."""
    if not isinstance(tree, dict) or not all(type(value) is kind for value in tree.values()):
        return None
    inside = all(not (path := PurePosixPath(name)).is_absolute() and ".." not in path.parts for name in tree)
    return tree if inside else None
