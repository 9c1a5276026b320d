"""The files of a checkpoint's folder, its name, and its manifest.

    step-000100/
      rank-00000.safetensors   rank 0's shards and random states
      rank-00001.safetensors
      manifest.json            size and sha256 of every file, shards, the run's state; written last

A folder without a manifest is not a checkpoint. The manifest contains its own sha256, computed with zeros in its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    ValidationError,
)

from qlora_dist.checkpoint.resharding import FLAT_DIM, ShardSpec

CHECKPOINT_MANIFEST = "manifest.json"
ABANDONED_FOLDER = "abandoned"
"""Folder, beside the checkpoints, of checkpoints that no run resumes from."""
MANIFEST_FORMAT = 1
_STEP = re.compile(r"step-(\d{6,})")
_ZEROS = "0" * 64


class DamagedCheckpointError(Exception):
    """A checkpoint cannot be used; the message says why."""


class CheckpointPermissionError(DamagedCheckpointError):
    """This user may not read a checkpoint. It may be complete, so no older one may be used instead."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`, which rank 0 writes when all ranks' files are written."""

    step: int
    """Optimizer steps that are done."""
    world_size: int
    cuts: dict[str, ShardSpec]
    """Shards of each trained parameter and its optimizer states, by name."""
    state: dict[str, Any]
    """State that is equal on all ranks: counters, loss scale, skipped batches."""
    identity: dict[str, Any]
    """Fingerprint of the run, which a run that resumes from here must share."""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Bytes and sha256 of each file, by name."""

    @property
    def optimizer_bits(self) -> int:
        """Bits of the optimizer states; 32 if the manifest has no such key."""
        return int(self.state.get("optimizer_bits", 32))

    def to_bytes(self) -> bytes:
        tree = {"format": MANIFEST_FORMAT, "sha256": _ZEROS, **asdict(self)}
        return _dump({**tree, "sha256": hashlib.sha256(_dump(tree)).hexdigest()})


_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    """The types of a part of the file. Other keys and other types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _ShardSpecSchema(_Strict):
    shape: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    dim: Annotated[int, Field(ge=FLAT_DIM)]
    shards: PositiveInt


class _RunFingerprintSchema(_Strict):
    base: str
    data: str
    config: Annotated[dict[str, Any], Field(min_length=1)]
    """Values by `section.key`."""
    adapter: str | None = None


class _TrainStateSchema(_Strict):
    progress: dict[str, Any]
    """Counters of the training loop, which checks their types."""
    optimizer_steps: NonNegativeInt
    optimizer_bits: Literal[8, 32] = 32
    loss_scale: tuple[PositiveFloat, NonNegativeInt]
    """Result of `LossScale.state`."""


class _ManifestSchema(_Strict):
    format: Literal[1]
    sha256: _Sha256
    step: NonNegativeInt
    world_size: PositiveInt
    cuts: Annotated[dict[str, _ShardSpecSchema], Field(min_length=1)]
    state: _TrainStateSchema
    identity: _RunFingerprintSchema
    files: dict[str, tuple[NonNegativeInt, _Sha256]]


def rank_file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the complete checkpoint after `step` steps."""
    return checkpoints / f"step-{step:06d}"


def partial_folder(folder: Path) -> Path:
    """Return the folder of a checkpoint while it is written."""
    return folder.with_name(f".{folder.name}.partial")


def find_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the folders that have a checkpoint's name, complete or not, newest first."""
    if not checkpoints.is_dir():
        return []
    folders = [path for path in checkpoints.iterdir() if _STEP.fullmatch(path.name)]
    return sorted(folders, key=folder_step, reverse=True)


def folder_step(folder: Path) -> int:
    match = _STEP.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def abandon_checkpoint(folder: Path) -> Path:
    """Move a checkpoint to `ABANDONED_FOLDER`, where no run resumes from it, and return its new folder."""
    aside = folder.with_name(ABANDONED_FOLDER)
    aside.mkdir(exist_ok=True)
    names = (f"{folder.name}{'' if number == 1 else f'-{number}'}" for number in count(1))
    free = next(aside / name for name in names if not os.path.lexists(aside / name))
    folder.rename(free)
    return free


def find_written_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the folders that have a checkpoint's name and a manifest, newest first. Others were never complete."""
    return [path for path in find_checkpoints(checkpoints) if (path / CHECKPOINT_MANIFEST).exists()]


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder.

    Raises:
        DamagedCheckpointError: it is missing, changed since it was written, or has other types.
    """
    path = folder / CHECKPOINT_MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(f"{CHECKPOINT_MANIFEST} cannot be read ({error.strerror})") from None
    try:
        tree = json.loads(content)
        digest, tree["sha256"] = tree["sha256"], _ZEROS
        if hashlib.sha256(_dump(tree)).hexdigest() != digest or _dump({**tree, "sha256": digest}) != content:
            raise DamagedCheckpointError(f"{CHECKPOINT_MANIFEST} is not what was written")
        if tree["format"] != MANIFEST_FORMAT:
            raise DamagedCheckpointError(
                f"{CHECKPOINT_MANIFEST} has format {tree['format']}, and this version reads {MANIFEST_FORMAT}"
            )
        schema = _ManifestSchema.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"]))
        raise DamagedCheckpointError(
            f"{CHECKPOINT_MANIFEST} is not one of a checkpoint: {location}: {first['msg']}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedCheckpointError(f"{CHECKPOINT_MANIFEST} is not what was written") from None
    cuts = {name: ShardSpec(cut.shape, cut.dim, cut.shards) for name, cut in schema.cuts.items()}
    manifest = Manifest(
        step=schema.step,
        world_size=schema.world_size,
        cuts=cuts,
        state=tree["state"],
        identity=schema.identity.model_dump(),
        files=dict(schema.files),
    )
    _check_consistent(folder, manifest)
    return manifest


def _check_consistent(folder: Path, manifest: Manifest) -> None:
    """Compare the parts of a manifest with each other and with the folder's name."""
    expected = {rank_file_name(rank) for rank in range(manifest.world_size)}
    if other := sorted(expected ^ manifest.files.keys()):
        raise DamagedCheckpointError(
            f"{CHECKPOINT_MANIFEST} of {manifest.world_size} ranks and its list of files differ: {other[0]}"
        )
    for name, cut in manifest.cuts.items():
        if cut.shards > manifest.world_size or not FLAT_DIM <= cut.dim < len(cut.shape):
            raise DamagedCheckpointError(
                f"{CHECKPOINT_MANIFEST} cuts {name} in a way that {manifest.world_size} ranks cannot"
            )
    named = _STEP.fullmatch(folder.name)
    if named is not None and int(named[1]) != manifest.step:
        raise DamagedCheckpointError(f"{CHECKPOINT_MANIFEST} is of step {manifest.step}")


def read_manifest_if_complete(folder: Path) -> Manifest | None:
    """Return the manifest of a checkpoint if all its files have the right size, else None. No file is read."""
    try:
        manifest = read_manifest(folder)
        sizes = all((folder / name).stat().st_size == nbytes for name, (nbytes, _) in manifest.files.items())
        return manifest if sizes else None
    except (DamagedCheckpointError, OSError):
        return None


def check_file(folder: Path, name: str, nbytes: int, sha256: str) -> None:
    """Check a file's size and sha256.

    Raises:
        DamagedCheckpointError: it is missing, or has other bytes.
    """
    path = folder / name
    try:
        if (size := path.stat().st_size) != nbytes:
            raise DamagedCheckpointError(f"{name} has {size:,} of {nbytes:,} bytes")
        if file_sha256(path) != sha256:
            raise DamagedCheckpointError(f"{name} is not what was written: its sha256 differs")
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{name} is missing") from None
    except PermissionError as error:
        raise CheckpointPermissionError(f"{name} cannot be read ({error.strerror})") from None
    except OSError as error:
        raise DamagedCheckpointError(f"{name} cannot be read ({error.strerror})") from None


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def write_and_fsync(path: Path, content: bytes) -> None:
    """Write a small file, and return when it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Return when the folder's names are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dump(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
