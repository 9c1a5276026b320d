"""Revision of a data set on the hub: asked by one process of a start, and remembered for nodes without a network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import NamedTuple

from qlora_dist.data.cache import LogFn, get_or_create_entry, remove_entry
from qlora_dist.data.hub import HubUnreachableError, fetch_hub_revision
from qlora_dist.data.strict_json import load_json_object
from qlora_dist.errors import UserError

_QUERY_INTERVAL_S = 60
"""Processes that ask within the same stretch of this length get one answer."""
_KEPT_INTERVALS = 10
"""Stretches for which answers are kept: slow processes may still read them."""
_PROCESS_START_S = time.time()
_ANSWER = "answer.json"


class HubRevision(NamedTuple):
    """The revision whose rows a run uses."""

    revision: str
    is_hub_reachable: bool
    """The hub has named it. Else it is the one that was prepared last."""


def resolve_hub_revision(name: str, cache: Path, key: str, log: LogFn) -> HubRevision:
    """Return the data set's newest revision, or without a network the one that was prepared last.

    Args:
        name: of the data set.
        cache: folder of all entries.
        key: of everything else that the rows' tokens depend on.
        log: told that the hub cannot be reached.

    Raises:
        UserError: the hub has no such data set or does not give access, or it cannot be reached and nothing was
            prepared.
    """
    revision, reason = query_hub_revision(name, cache, log)
    if revision is not None:
        return HubRevision(revision, True)
    revision = last_prepared_revision(cache, key)
    if revision is None:
        raise unprepared_dataset_error(name, reason)
    log(
        f"{name}: the Hugging Face hub can't be asked ({reason}); the rows of revision {revision[:12]} are used, which "
        "were prepared before"
    )
    return HubRevision(revision, False)


def unprepared_dataset_error(name: str, reason: str) -> UserError:
    """Return the refusal of a data set that is neither reachable nor in the cache."""
    return UserError(
        f"{name}: no such file or folder here, and the Hugging Face hub can't be asked ({reason}); correct the path, "
        "or run qlora-dist preprocess with this configuration where there is a network, into a data.cache that this "
        "machine sees"
    )


def query_hub_revision(name: str, cache: Path, log: LogFn) -> tuple[str | None, str]:
    """Return the data set's revision; or None, and why the hub cannot be reached.

    All processes that share the cache and ask within a minute make one request together.

    Raises:
        UserError: the hub has no such data set, or it does not give access.
    """
    if cache.exists() and not os.access(cache, os.W_OK):  # what lies in it may still be used
        return _try_fetch_revision(name)
    interval = int(time.time() // _QUERY_INTERVAL_S)
    prefix = hashlib.sha256(name.encode()).hexdigest()
    folder = cache / "hub" / f"{prefix}-{interval}"

    def make(partial: Path) -> None:
        revision, reason = _try_fetch_revision(name)
        answer = {"name": name, "revision": revision, "unreachable": reason, "time": time.time()}
        (partial / _ANSWER).write_text(json.dumps(answer) + "\n", encoding="utf-8")
        for old in folder.parent.glob(f"{prefix}-*"):
            number = old.name.removeprefix(f"{prefix}-")
            if number.isdigit() and int(number) < interval - _KEPT_INTERVALS:
                remove_entry(old)

    get_or_create_entry(folder, make, log)
    answer = load_json_object(folder / _ANSWER)
    if answer.get("revision") is None and answer.get("time", 0) < _PROCESS_START_S:  # the network may be back since
        return _try_fetch_revision(name)
    return answer.get("revision"), str(answer.get("unreachable", ""))


def last_prepared_revision(cache: Path, key: str) -> str | None:
    """Return the revision whose rows were prepared last under this key; None: none was."""
    revision = load_json_object(_revision_path(cache, key)).get("revision")
    return revision if isinstance(revision, str) else None


def record_prepared_revision(cache: Path, key: str, name: str, revision: str) -> None:
    """Note which revision has been prepared. A cache that cannot be written stays as it is."""
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
