"""What tokenized data depends on, as the name of its cache entry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlora_dist.config.sections import DataConfig, SourceConfig
from qlora_dist.data.cache import LogFn, get_or_create_entry
from qlora_dist.data.entry_manifest import sha256_hexdigest
from qlora_dist.data.source import source_files
from qlora_dist.errors import UserError

CACHE_KEY_VERSION = 2
"""Raised whenever the same rows are stored in another way, or read in another."""

_THREADS = 8
_DIGESTS = "digests.json"


def source_cache_key(
    source: SourceConfig,
    config: DataConfig,
    encoder_fingerprint: str,
    cache: Path,
    log: LogFn,
    revision: str | None = None,
) -> str:
    """SHA-256 in hex: the same for the same content, wherever the files lie and whenever they were written.

    Of a data set on the hub, `revision` stands for the content.

    Not in it, since sequences are stored whole: lengths, packing and weights.

    Raises:
        UserError: the source cannot be read, or the cache not be written.
    """
    bad_rows = {"most": config.max_bad_rows} if config.on_bad_row == "skip" else None
    return _sha256(
        {
            "version": CACHE_KEY_VERSION,
            "content": _content(source, cache, log, revision),
            "format": source.format or config.format,
            "split": source.split,
            "encoder": encoder_fingerprint,
            "skip bad rows": bad_rows,
        }
    )


def source_file_stats(files: Sequence[Path]) -> list[tuple[str, int, int, int]]:
    """Path, size, time of the last change and inode of each: if these are the same, so is the content.

    Raises:
        UserError: a file is gone.
    """
    states = []
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from None
        states.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return states


def _content(source: SourceConfig, cache: Path, say: LogFn, revision: str | None) -> Any:
    files = source_files(source)
    if not files:
        return {"hub": source.path, "subset": source.subset, "revision": revision}
    return [(_file_extension(path), digest) for path, digest in zip(files, _digests(files, cache, say), strict=True)]


def _file_extension(path: Path) -> str:
    """It says how the file is read, '.jsonl' or '.jsonl.gz'; the rest of the name says nothing."""
    return "".join(path.suffixes[-2 if path.suffix.lower() == ".gz" else -1 :]).lower()


def _digests(files: list[Path], cache: Path, say: LogFn) -> list[str]:
    """Each file's SHA-256. They are read by one process, and once as long as they stay as they are."""
    states = source_file_stats(files)

    def make(folder: Path) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = list(pool.map(_digest, files))
        if source_file_stats(files) != states:
            raise UserError(
                f"{files[0]}: was changed while it was read, or one beside it; start again when it is written"
            )
        (folder / _DIGESTS).write_text(json.dumps(digests) + "\n", encoding="utf-8")

    def read(folder: Path) -> list[str]:
        digests: list[str] = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        if len(digests) != len(files) or not all(isinstance(digest, str) for digest in digests):
            raise ValueError(f"{_DIGESTS} has not one digest for each file")
        return digests

    return read(get_or_create_entry(cache / "digests" / _sha256(states), make, say, read))


def _digest(path: Path) -> str:
    try:
        return sha256_hexdigest(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror or error}); give the path of a data file")


def _sha256(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
