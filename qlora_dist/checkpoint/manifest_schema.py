"""The types of a checkpoint's manifest. Other keys and other types are errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, StringConstraints

MANIFEST_FORMAT = 1
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ShardSpecSchema(_Strict):
    """The shards of a tensor, as in `ShardSpec`."""

    shape: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """Shape of the whole tensor."""
    dim: Annotated[int, Field(ge=-1)]
    """Dimension that is sharded; -1: the elements as one flat row."""
    shards: PositiveInt
    """Number of parts."""


class RunFingerprintSchema(_Strict):
    """The result of `run_fingerprint`."""

    base: str
    """Fingerprint of the base model."""
    data: str
    """Fingerprint of the training data."""
    config: Annotated[dict[str, Any], Field(min_length=1)]
    """Values by `section.key`."""
    adapter: str | None = None
    """Fingerprint of the adapter that the run began from."""


class TrainStateSchema(_Strict):
    """State that is equal on all ranks."""

    progress: dict[str, Any]
    """Counters of the training loop, which checks their types."""
    optimizer_steps: NonNegativeInt
    """Updates of the adapters."""
    optimizer_bits: Literal[8, 32] = 32
    """Bits of the optimizer states."""
    loss_scale: tuple[PositiveFloat, NonNegativeInt]
    """fp16's loss scale, and the finite steps since it last changed."""


class ManifestSchema(_Strict):
    """The file `manifest.json`."""

    format: Literal[1]
    """Value of `MANIFEST_FORMAT`."""
    sha256: _Sha256
    """Hash of the file with zeros in this place."""
    step: NonNegativeInt
    """Optimizer steps that are done."""
    world_size: PositiveInt
    """Number of ranks that wrote it."""
    cuts: Annotated[dict[str, ShardSpecSchema], Field(min_length=1)]
    """Shards of each trained parameter and its optimizer states."""
    state: TrainStateSchema
    """Counters and scales."""
    identity: RunFingerprintSchema
    """Fingerprint of the run, which a run that resumes from here must share."""
    files: dict[str, tuple[NonNegativeInt, _Sha256]]
    """Bytes and sha256 of each rank's file."""
