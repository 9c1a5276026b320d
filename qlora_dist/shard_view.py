"""What of a parameter lies on this rank, whichever engine has cut it.

FSDP2's parameters are DTensors, cut along a dimension. ZeRO-3's hold nothing between uses; their elements are cut as
one row, and `FlatShard` says which part of it is this rank's. A parameter that is neither is whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

_FLAT_SHARD_ATTRIBUTE = "flat_shard"


@dataclass
class FlatShard:
    """A part of a parameter's elements in a row: ceil(n / shards) for each rank, the last ones having fewer or none."""

    shape: torch.Size
    """Of the whole."""
    padded: torch.Tensor
    """[ceil(n / shards)], the values in the parameter's own type, on every rank as many."""
    gathered: torch.Tensor
    """[ceil(n / shards)], the same in the type in which the engine gathers them; `padded` itself, if that is its own.
    The engine rounds the values anew before they are used."""
    group: dist.ProcessGroup
    """Of the ranks that hold the other parts."""
    is_first_replica: bool
    """Whether no rank before this one holds the same part."""
    whole: torch.Tensor | None = None
    """[shards * ceil(n / shards)], where this rank has all parts at all times (ZeRO's stage 2)."""
    gradient: torch.Tensor | None = None
    """Of `local`, summed over all ranks: what the engine leaves here after a window's last backward pass."""
    had_grad: bool = False
    """Whether backward has ever come to the parameter on this rank."""

    @property
    def shard(self) -> int:
        """Which part is this rank's."""
        return self.group.rank()

    @property
    def shards(self) -> int:
        """How many parts there are."""
        return self.group.size()

    @property
    def first(self) -> int:
        """Its first element, among those of the whole in a row."""
        return min(self.shard * self.padded.numel(), self.shape.numel())

    @property
    def local(self) -> torch.Tensor:
        """[n], the values without what is padded; an alias."""
        return self.padded[: max(0, min(self.padded.numel(), self.shape.numel() - self.first))]


def set_flat_shard(parameter: nn.Parameter, shard: FlatShard) -> None:
    """Say what of a parameter is this rank's."""
    setattr(parameter, _FLAT_SHARD_ATTRIBUTE, shard)


def get_flat_shard(parameter: torch.Tensor) -> FlatShard | None:
    """None: an engine with whole rows has cut it, or none."""
    return getattr(parameter, _FLAT_SHARD_ATTRIBUTE, None)


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of all parts together."""
    flat = get_flat_shard(parameter)
    return parameter.shape if flat is None else flat.shape


def local_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part, an alias: a shard as FSDP2 cuts, [n] as ZeRO-3 does, or the whole."""
    flat = get_flat_shard(parameter)
    if flat is not None:
        return flat.local
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def pop_local_grad(parameter: nn.Parameter) -> torch.Tensor | None:
    """Return the gradient of this rank's part, which the parameter then has no longer; None: the loss has none."""
    flat = get_flat_shard(parameter)
    if flat is not None:
        gradient, flat.gradient = flat.gradient, None
    else:
        gradient, parameter.grad = parameter.grad, None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def local_slice(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Of a tensor of the parameter's whole shape, what lies where this rank's part does."""
    flat = get_flat_shard(parameter)
    if flat is not None:
        return full.reshape(-1)[flat.first : flat.first + flat.local.numel()]
    local, offset = local_tensor_and_offset(parameter)
    for dim, start in enumerate(offset):
        full = full.narrow(dim, min(start, full.shape[dim]), local.shape[dim])
    return full


def full_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """The whole, in the parameter's own type. Called on all ranks that share it."""
    flat = get_flat_shard(parameter)
    if flat is None:
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    parts = flat.padded.new_empty(flat.shards * flat.padded.numel())
    dist.all_gather_single(parts, flat.padded, group=flat.group)
    return parts[: flat.shape.numel()].view(flat.shape)


def local_tensor_and_offset(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """This rank's part of a parameter, and where in the whole it starts: by dimension, or as one number in the row."""
    flat = get_flat_shard(parameter)
    if flat is not None:
        return flat.local, (flat.first,)
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    local, offset = parameter.to_local(), [0] * parameter.dim()
    # Shards are equal but for the last ones. torch's compute_local_shape_and_global_offset (2.13) makes a list of the
    # dimension's indices, and for a vector of bytes that is eight times the vector.
    for mesh_dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            dim, size = placement.dim, parameter.shape[placement.dim]
            rows = -(-size // parameter.device_mesh.size(mesh_dim))
            offset[dim] = min(parameter.device_mesh.get_local_rank(mesh_dim) * rows, size)
            assert local.shape[dim] == min(rows, size - offset[dim]), f"{local.shape} of {parameter.shape}"
    return local, tuple(offset)


def flat_offset(parameter: torch.Tensor) -> int:
    """Where this rank's part starts in the whole's elements in a row; the part must lie there in one piece."""
    flat = get_flat_shard(parameter)
    if flat is not None:
        return flat.first
    _, offset = local_tensor_and_offset(parameter)
    assert not any(offset[1:])
    return offset[0] * math.prod(parameter.shape[1:]) if offset else 0
