"""Which checkpoint a run goes on from: the newest that is whole, by every file's sha256."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from qlora_dist.checkpoint.manifest import (
    CheckpointPermissionError,
    DamagedCheckpointError,
    Manifest,
    check_file,
    find_checkpoints,
    rank_file_name,
    read_manifest,
)
from qlora_dist.checkpoint.rank_file import check_rank_file
from qlora_dist.errors import UserError
from qlora_dist.runtime.object_collectives import all_gather_json, broadcast_json

CheckManifest = Callable[[Manifest], None]
"""A check of what only the caller knows of a manifest. It raises `DamagedCheckpointError`."""


def latest_complete(
    checkpoints: Path, log: Callable[[str], None], check: CheckManifest | None = None
) -> tuple[Path, Manifest] | None:
    """The newest checkpoint of a run all of whose bytes are as they were written; None: there is none.

    Called on all ranks, which share the reading. Damaged ones are passed over, with a line that says why. A folder
    without a manifest is not one of ours, or never was complete, and is passed over like those.

    Raises:
        UserError: on all ranks, if one of them may not read a checkpoint.
    """
    # rank 0's list: file systems do not show all nodes the same at the same moment
    for folder in map(Path, broadcast_json([str(path) for path in find_checkpoints(checkpoints)])):
        damage = _find_damage(folder, check)
        if damage is None:
            return folder, read_manifest(folder)
        log(f"{folder}: {damage}; it is passed over")
    return None


def verify_checkpoint(folder: Path, check: CheckManifest | None = None) -> Manifest:
    """The manifest of a checkpoint that was named. Called on all ranks.

    Raises:
        UserError: on all ranks, if it is no checkpoint or damaged.
    """
    damage = _find_damage(folder, check)
    if damage is not None:
        raise UserError(f"{folder}: {damage}; give another checkpoint, or --resume auto")
    return read_manifest(folder)


def _find_damage(folder: Path, check: CheckManifest | None) -> str | None:
    """What is wrong, the same on all ranks.

    Raises:
        UserError: on all ranks, if one of them may not read a file.
    """
    own_reason, is_forbidden = None, False
    try:
        manifest = read_manifest(folder)
        if check is not None:
            check(manifest)
        for rank in range(dist.get_rank(), manifest.world_size, dist.get_world_size()):
            check_file(folder, rank_file_name(rank), *manifest.files[rank_file_name(rank)])
            check_rank_file(folder, rank, manifest)
    except DamagedCheckpointError as error:
        own_reason, is_forbidden = str(error), isinstance(error, CheckpointPermissionError)
    reasons = [answer for answer in all_gather_json([own_reason, is_forbidden]) if answer[0] is not None]
    for reason, forbidden in reasons:
        if forbidden:
            raise UserError(f"{folder}: {reason}; change its owner or mode")
    return reasons[0][0] if reasons else None
