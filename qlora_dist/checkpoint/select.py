"""The choice of the checkpoint that a run resumes from: the newest whose files all have the right sha256."""

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
"""A further check of a manifest by the caller. It raises `DamagedCheckpointError`."""


def latest_complete(
    checkpoints: Path, log: Callable[[str], None], check: CheckManifest | None = None
) -> tuple[Path, Manifest] | None:
    """Return a run's newest checkpoint whose bytes are all as they were written; None if there is none.

    All ranks call this, and each reads a part. Damaged checkpoints and folders without a manifest are skipped, and
    `log` gets the reason. If a rank may not read a checkpoint, all ranks raise `UserError`.
    """
    # rank 0's list, because a shared file system may show nodes different folders for a moment
    for folder in map(Path, broadcast_json([str(path) for path in find_checkpoints(checkpoints)])):
        damage = _find_damage(folder, check)
        if damage is None:
            return folder, read_manifest(folder)
        log(f"{folder}: {damage}; it is skipped")
    return None


def verify_checkpoint(folder: Path, check: CheckManifest | None = None) -> Manifest:
    """Return the manifest of a checkpoint that the user named. All ranks call this.

    If the folder is no checkpoint, or is damaged, all ranks raise `UserError`.
    """
    damage = _find_damage(folder, check)
    if damage is not None:
        raise UserError(f"{folder}: {damage}; give another checkpoint, or --resume auto")
    return read_manifest(folder)


def _find_damage(folder: Path, check: CheckManifest | None) -> str | None:
    """Return what is wrong with a checkpoint, the same on all ranks; None if nothing is."""
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
