"""Check whether a folder is shared by all ranks."""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from qlora_dist.runtime.object_collectives import all_gather_json, broadcast_json

_VISIBLE_TIMEOUT_S = 20.0
"""Seconds until a rank counts as blind. Some file systems show another node's files only after a while."""


@dataclass(frozen=True)
class SharedFolderCheck:
    """Result of the check, which is the same on all ranks."""

    failure: str | None
    """Reason why rank 0 cannot write into the folder; None if it can."""
    blind_ranks: list[int]
    """Ranks that do not see rank 0's file."""
    hosts: list[str]
    """Host name of each rank."""


def probe_shared_folder(folder: Path) -> SharedFolderCheck:
    """Check that a file that rank 0 writes into `folder` is visible on each rank. Call it on all ranks.

    The file is removed. Rank 0 creates the folder if it does not exist.
    """
    name, token, failure = f".qlora-dist-{secrets.token_hex(8)}", secrets.token_hex(8), None
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(token, encoding="utf-8")
        except OSError as error:
            failure = str(error.strerror or error)
    name, token, failure = broadcast_json([name, token, failure])
    seen = failure is None and _file_is_visible(folder, name, token)
    by_rank = all_gather_json([seen, socket.gethostname()])
    if dist.get_rank() == 0:
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    blind = [] if failure is not None else [rank for rank, (seen, _) in enumerate(by_rank) if not seen]
    return SharedFolderCheck(failure, blind, [host for _, host in by_rank])


def _file_is_visible(folder: Path, name: str, token: str) -> bool:
    end = time.monotonic() + _VISIBLE_TIMEOUT_S
    while True:
        with suppress(OSError):
            os.listdir(folder)  # noqa: PTH208  # opening the folder makes NFS ask the server for new entries
            if (folder / name).read_text(encoding="utf-8") == token:
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.2)
