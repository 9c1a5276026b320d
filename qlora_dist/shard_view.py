"""The part of a sharded parameter that this rank holds, whichever engine sharded it.

FSDP2's parameters are DTensors, sharded along a dimension. ZeRO-3's parameters hold nothing between uses. Their
elements are split as one flat row, and `FlatShard` describes this rank's part. Any other parameter is whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

_FLAT_SHARD_ATTRIBUTE = "flat_shard"


@dataclass(kw_only=True)
class FlatShard:
    """A part of a parameter's flat row: ceil(n / num_shards) elements; the last parts have fewer or none."""

    shape: torch.Size
    """Shape of the whole parameter."""
    padded: torch.Tensor
    """[ceil(n / num_shards)], the values in the parameter's dtype, padded to the same length on every rank."""
    gathered: torch.Tensor
    """[ceil(n / num_shards)], the values in the dtype in which the engine gathers them.

    This is `padded` if the dtypes are equal. Else the engine rounds the values again before they are used."""
    group: dist.ProcessGroup
    """Ranks that share the parameter."""
    is_first_replica: bool
    """Whether no rank before this one holds the same part."""
    full: torch.Tensor | None = None
    """[num_shards * ceil(n / num_shards)], if this rank always has all parts (ZeRO's stage 2)."""
    grad: torch.Tensor | None = None
    """Gradient of `local`, summed over all ranks. The engine sets it after a window's last backward pass."""
    had_grad: bool = False
    """Whether the parameter has ever had a gradient on this rank."""

    @property
    def shard_index(self) -> int:
        """Index of this rank's part."""
        return self.group.rank()

    @property
    def num_shards(self) -> int:
        """Number of parts."""
        return self.group.size()

    @property
    def offset(self) -> int:
        """First element of this part in the flat row."""
        return min(self.shard_index * self.padded.numel(), self.shape.numel())

    @property
    def local(self) -> torch.Tensor:
        """[n], the values without the padding, as an alias."""
        return self.padded[: max(0, min(self.padded.numel(), self.shape.numel() - self.offset))]


def set_flat_shard(parameter: nn.Parameter, shard: FlatShard) -> None:
    """Attach this rank's part to a parameter."""
    setattr(parameter, _FLAT_SHARD_ATTRIBUTE, shard)


def get_flat_shard(parameter: torch.Tensor) -> FlatShard | None:
    """Return this rank's part; None if the parameter is whole or a DTensor."""
    return getattr(parameter, _FLAT_SHARD_ATTRIBUTE, None)


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the shape of the whole parameter."""
    flat = get_flat_shard(parameter)
    return parameter.shape if flat is None else flat.shape


def local_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part as an alias: FSDP2's shard, ZeRO-3's [n], or the whole parameter."""
    flat = get_flat_shard(parameter)
    if flat is not None:
        return flat.local
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def pop_local_grad(parameter: nn.Parameter) -> torch.Tensor | None:
    """Return the gradient of this rank's part and remove it from the parameter; None if there is none."""
    flat = get_flat_shard(parameter)
    if flat is not None:
        gradient, flat.grad = flat.grad, None
    else:
        gradient, parameter.grad = parameter.grad, None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def local_slice(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Return the elements of `full`, which has the whole parameter's shape, that lie in this rank's part."""
    flat = get_flat_shard(parameter)
    if flat is not None:
        return full.reshape(-1)[flat.offset : flat.offset + flat.local.numel()]
    local, offset = local_tensor_and_offset(parameter)
    for dim, start in enumerate(offset):
        full = full.narrow(dim, min(start, full.shape[dim]), local.shape[dim])
    return full


def full_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """Return the whole parameter in its own dtype. All ranks that share it call this."""
    flat = get_flat_shard(parameter)
    if flat is None:
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    parts = flat.padded.new_empty(flat.num_shards * flat.padded.numel())
    dist.all_gather_single(parts, flat.padded, group=flat.group)
    return parts[: flat.shape.numel()].view(flat.shape)


def local_tensor_and_offset(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return this rank's part and its start in the whole: an index per dimension, or one in the flat row."""
    flat = get_flat_shard(parameter)
    if flat is not None:
        return flat.local, (flat.offset,)
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    local, offset = parameter.to_local(), [0] * parameter.dim()
    # All shards but the last ones are equal. `compute_local_shape_and_global_offset` of torch 2.13 is not used, because
    # it lists the dimension's indices. For a vector of bytes they take eight times its memory.
    for mesh_dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            dim, size = placement.dim, parameter.shape[placement.dim]
            rows = -(-size // parameter.device_mesh.size(mesh_dim))
            offset[dim] = min(parameter.device_mesh.get_local_rank(mesh_dim) * rows, size)
            assert local.shape[dim] == min(rows, size - offset[dim]), f"{local.shape} of {parameter.shape}"
    return local, tuple(offset)


def flat_offset(parameter: torch.Tensor) -> int:
    """Return the start of this rank's part in the whole's flat row. The part must be contiguous there."""
    flat = get_flat_shard(parameter)
    if flat is not None:
        return flat.offset
    _, offset = local_tensor_and_offset(parameter)
    assert not any(offset[1:])
    return offset[0] * math.prod(parameter.shape[1:]) if offset else 0
