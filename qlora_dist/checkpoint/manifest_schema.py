"""The types of a checkpoint's manifest. Nothing else is read: neither other keys nor other types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, StringConstraints

MANIFEST_FORMAT = 1
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ShardSpecSchema(_Strict):
    """A `Cut`."""

    shape: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """Shape of the whole tensor."""
    dim: Annotated[int, Field(ge=-1)]
    """Dimension that is cut; -1: the elements as one row."""
    shards: PositiveInt
    """Number of parts."""


class RunFingerprintSchema(_Strict):
    """What `identity_of` gives."""

    base: str
    """Fingerprint of the base model."""
    data: str
    """Fingerprint of the training data."""
    config: Annotated[dict[str, Any], Field(min_length=1)]
    """Values by `section.key`."""
    adapter: str | None = None
    """Fingerprint of the adapter that the run began from."""


class TrainStateSchema(_Strict):
    """What is the same on all ranks."""

    progress: dict[str, Any]
    """Counters of the loop, which has a schema of its own for them."""
    optimizer_steps: NonNegativeInt
    """Updates of the adapters."""
    optimizer_bits: Literal[8, 32] = 32
    """Bits of the moments."""
    loss_scale: tuple[PositiveFloat, NonNegativeInt]
    """fp16's loss scale, and the finite steps since it last changed."""


class ManifestSchema(_Strict):
    """The file `manifest.json`."""

    format: Literal[1]
    """FORMAT."""
    sha256: _Sha256
    """Sum over the file with zeros in this place."""
    step: NonNegativeInt
    """Optimizer steps that are done."""
    world_size: PositiveInt
    """Number of ranks that wrote it."""
    cuts: Annotated[dict[str, ShardSpecSchema], Field(min_length=1)]
    """How each trained parameter and its moments are cut."""
    state: TrainStateSchema
    """Counters and scales."""
    identity: RunFingerprintSchema
    """What a run that goes on from here must have in common."""
    files: dict[str, tuple[NonNegativeInt, _Sha256]]
    """Bytes and sha256 of each rank's file."""
