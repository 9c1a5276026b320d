"""Data sets on the Hugging Face hub: their revision, which the cache keeps for offline nodes, and their rows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from qlora_dist.data.arrow_files import ROWS_PER_BATCH, record_batch_to_rows
from qlora_dist.data.cache import LogFn, get_or_create_entry, remove_entry
from qlora_dist.data.source_row import BadRow
from qlora_dist.data.strict_json import load_json_object
from qlora_dist.data.validate import RawRow, format_exception_message
from qlora_dist.errors import UserError

_DATASET_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_TIMEOUT_S = 10
_QUERY_INTERVAL_S = 60
"""Seconds of an interval within which all processes use the answer to one query."""
_KEPT_INTERVALS = 10
"""Intervals for which answers are kept, because slow processes may still read them."""
_PROCESS_START_S = time.time()
_ANSWER_FILE = "answer.json"


def is_hub_dataset_name(name: str) -> bool:
    """Return whether the name can be a data set's ('owner/name' or 'name')."""
    return _DATASET_NAME.fullmatch(name) is not None


class HubUnreachableError(UserError):
    """The Hugging Face hub cannot be reached."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name}: no such file or folder here, and the Hugging Face hub cannot be reached ({reason}); correct the "
            "path, or download the data set where there is a network"
        )
        self.reason = reason


def fetch_hub_revision(name: str) -> str:
    """Return the newest commit of a data set, within seconds.

    Raises:
        UserError: the data set is not on the hub, or the hub cannot be reached (`HubUnreachableError`).
    """
    from huggingface_hub import HfApi  # `datasets` would retry for half a minute.
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return str(HfApi().dataset_info(name, timeout=_TIMEOUT_S).sha)
    except GatedRepoError:
        raise UserError(f"{name}: access to this data set must be requested; do so on its page of the hub") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such file or folder here, and no such data set on the Hugging Face hub; correct the path, or "
            "log in if the data set is private (hf auth login)"
        ) from None
    except Exception as error:  # The libraries below raise dozens of unrelated types.
        raise HubUnreachableError(name, format_exception_message(error)) from None


class HubRevision(NamedTuple):
    """Revision whose rows a run uses."""

    revision: str
    is_hub_reachable: bool
    """True if the hub returned the revision; false if it is the one that was prepared last."""


def resolve_hub_revision(name: str, cache: Path, key: str, log: LogFn) -> HubRevision:
    """Return the newest revision of a data set; without a network, the one that was prepared last.

    `key` is the hash of everything else that the tokens depend on.
    """
    revision, reason = query_hub_revision(name, cache, log)
    if revision is not None:
        return HubRevision(revision, True)
    revision = last_prepared_revision(cache, key)
    if revision is None:
        raise unprepared_dataset_error(name, reason)
    log(
        f"{name}: the Hugging Face hub cannot be reached ({reason}); the rows of revision {revision[:12]} are used, "
        "which were prepared before"
    )
    return HubRevision(revision, False)


def unprepared_dataset_error(name: str, reason: str) -> UserError:
    return UserError(
        f"{name}: no such file or folder here, and the Hugging Face hub cannot be reached ({reason}); "
        "correct the path, or run qlora-dist preprocess with this configuration where there is a network, into a "
        "data.cache that this machine sees"
    )


def query_hub_revision(name: str, cache: Path, log: LogFn) -> tuple[str | None, str]:
    """Return the revision of a data set; or None and the reason why the hub cannot be reached.

    All processes that share the cache make one request per minute together.
    """
    if cache.exists() and not os.access(cache, os.W_OK):  # Its entries may still be used.
        return _try_fetch_revision(name)
    interval = int(time.time() // _QUERY_INTERVAL_S)
    prefix = hashlib.sha256(name.encode()).hexdigest()
    folder = cache / "hub" / f"{prefix}-{interval}"

    def create(partial: Path) -> None:
        revision, reason = _try_fetch_revision(name)
        answer = {"name": name, "revision": revision, "unreachable": reason, "time": time.time()}
        (partial / _ANSWER_FILE).write_text(json.dumps(answer) + "\n", encoding="utf-8")
        for old in folder.parent.glob(f"{prefix}-*"):
            number = old.name.removeprefix(f"{prefix}-")
            if number.isdigit() and int(number) < interval - _KEPT_INTERVALS:
                remove_entry(old)

    get_or_create_entry(folder, create, log)
    answer = load_json_object(folder / _ANSWER_FILE)
    if answer.get("revision") is None and answer.get("time", 0) < _PROCESS_START_S:  # The network may be back.
        return _try_fetch_revision(name)
    return answer.get("revision"), str(answer.get("unreachable", ""))


def last_prepared_revision(cache: Path, key: str) -> str | None:
    """Return the revision whose rows were prepared last under this key; None if none were."""
    revision = load_json_object(_revision_path(cache, key)).get("revision")
    return revision if isinstance(revision, str) else None


def record_prepared_revision(cache: Path, key: str, name: str, revision: str) -> None:
    """Record the revision that has been prepared. A cache without write access stays unchanged."""
    if last_prepared_revision(cache, key) == revision:
        return
    path = _revision_path(cache, key)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"name": name, "revision": revision}) + "\n", encoding="utf-8")
        temporary.replace(path)


def _revision_path(cache: Path, key: str) -> Path:
    return cache / "hub" / f"{key}.json"


def _try_fetch_revision(name: str) -> tuple[str | None, str]:
    try:
        return fetch_hub_revision(name), ""
    except HubUnreachableError as error:
        return None, error.reason


def read_hub_dataset(
    name: str, subset: str | None, split: str, revision: str | None = None
) -> Iterator[RawRow | BadRow]:
    """Yield the rows of a data set on the hub at a commit, by default the newest. No code of the data set runs."""
    revision = revision or fetch_hub_revision(name)
    import datasets  # here, because the import takes seconds

    row = 0
    try:
        streamed = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
        # As Arrow, because its types show which nulls it filled in.
        for table in streamed.with_format("arrow").iter(ROWS_PER_BATCH):
            for fields in chain.from_iterable(map(record_batch_to_rows, table.to_batches())):
                row += 1
                location = f"{name}, row {row}"
                yield BadRow(location, fields) if isinstance(fields, str) else (location, fields)
    except Exception as error:
        where = f"after row {row}" if row else f"with split: {split}" + (f", subset: {subset}" if subset else "")
        raise UserError(
            f"{name}: cannot be read from the Hugging Face hub {where} ({format_exception_message(error)}); "
            "correct that, or download the data set and give the folder"
        ) from None
