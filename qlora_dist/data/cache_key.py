"""Cache keys of tokenized data: hashes of everything that the tokens depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlora_dist.config.sections import DataConfig, SourceConfig
from qlora_dist.data.cache import LogFn, get_or_create_entry
from qlora_dist.data.data_files import file_extension
from qlora_dist.data.entry_manifest import sha256_hexdigest
from qlora_dist.data.source import source_files
from qlora_dist.errors import UserError

CACHE_KEY_VERSION = 2
"""Version of the cache format. Raise it when the same rows are read or stored differently."""

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
    """Return the SHA-256 in hex of everything that a source's tokens depend on.

    The key depends on the content of the files, not on their location or time. It also does not depend on lengths,
    packing and weights, because sequences are stored uncut. `revision` stands for the content of a data set on the hub.
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
    """Return path, size, modification time and inode of each file. If they are equal, the content is too."""
    states = []
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from None
        states.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return states


def _content(source: SourceConfig, cache: Path, log: LogFn, revision: str | None) -> Any:
    files = source_files(source)
    if not files:
        return {"hub": source.path, "subset": source.subset, "revision": revision}
    # The extension selects the reader.
    return [
        (file_extension(path).lower(), digest) for path, digest in zip(files, _digests(files, cache, log), strict=True)
    ]


def _digests(files: list[Path], cache: Path, log: LogFn) -> list[str]:
    """Return the SHA-256 of each file. One process reads the files, and only once as long as they do not change."""
    states = source_file_stats(files)

    def make(folder: Path) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = list(pool.map(_digest, files))
        if source_file_stats(files) != states:
            raise UserError(
                f"{files[0]}: this file, or one beside it, changed while it was read; start again when it is written"
            )
        (folder / _DIGESTS).write_text(json.dumps(digests) + "\n", encoding="utf-8")

    def read(folder: Path) -> list[str]:
        digests: list[str] = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        if len(digests) != len(files) or not all(isinstance(digest, str) for digest in digests):
            raise ValueError(f"{_DIGESTS} does not have one digest per file")
        return digests

    return read(get_or_create_entry(cache / "digests" / _sha256(states), make, log, read))


def _digest(path: Path) -> str:
    try:
        return sha256_hexdigest(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror or error}); give the path of a data file")


def _sha256(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
