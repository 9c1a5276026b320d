"""The bytes that a rank holds between steps, and the check that they do not exceed its share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from qlora_dist.compat.torch import storage_key
from qlora_dist.parallel.mesh import MeshSizes
from qlora_dist.shard_view import full_shape, get_flat_shard

STATIC_BYTES_TOLERANCE = 0.01


def check_static_bytes(model: nn.Module, sizes: MeshSizes, paged_bytes: int = 0, paged_budget: int = 0) -> int:
    """Check that this rank holds no more than its share, because replication would go unnoticed otherwise.

    The share is the base's bytes / base_shards + the adapters' bytes / adapter_shards, within 1 %, plus the engine's
    padding. Parameters are split into whole rows (FSDP2) or elements (ZeRO-3), and every rank holds the largest part.
    Parameters whose shards are in pages are on the meta device; their sizes are compared like all others.

    Args:
        model: sharded model with weights.
        sizes: sizes of the meshes.
        paged_bytes: bytes of pages on this rank's device.
        paged_budget: most bytes of pages on this rank's device.

    Returns:
        Bytes that this rank holds, pages included.

    Raises:
        RuntimeError: the rank holds more, which is a bug of this package.
    """
    share, padding = 0.0, 0.0
    excess: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        shards = sizes.adapter_shards if parameter.requires_grad else sizes.base_shards
        parts, rows = _shards(parameter), _num_rows(parameter)
        whole = full_shape(parameter).numel() * sum(part.element_size() for part in parts)
        padded = whole / rows * -(-rows // shards)
        replicated = _replicated_bytes(parameter)
        share += whole / shards + replicated
        padding += padded - whole / shards
        excess[name] = sum(_storage(part).nbytes() for part in parts) - padded - replicated
    if paged_bytes > paged_budget:
        raise RuntimeError(f"this rank holds {paged_bytes:,} bytes of pages where its budget is {paged_budget:,}")
    held = sum(s.nbytes() for s in _storages(model))
    buffers = sum(b.nbytes for b in model.buffers())  # rotary frequencies, which every rank has
    if held > share * (1 + STATIC_BYTES_TOLERANCE) + padding + buffers:
        worst = sorted(excess, key=excess.__getitem__, reverse=True)[:3]
        raise RuntimeError(
            f"this rank holds {held:,} bytes where its share is {share:,.0f}; the largest excess is in "
            + ", ".join(f"{name} (+{excess[name]:,.0f})" for name in worst)
        )
    return model_static_bytes(model) + paged_bytes


def model_static_bytes(model: nn.Module) -> int:
    """Return the bytes of all tensors of a model on this rank, padding included. A storage counts once."""
    return sum(s.nbytes() for s in _storages(model) if s.device.type != "meta")


def _storages(model: nn.Module) -> list[torch.UntypedStorage]:
    storages = [_storage(tensor) for tensor in _tensors(model)]
    return list({storage_key(s) if s.device.type == "meta" else s.data_ptr(): s for s in storages}.values())


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    for parameter in model.parameters():
        yield from _shards(parameter)
    yield from model.buffers()
    for module in model.modules():  # such as bitsandbytes' quantization state, which is in no state_dict
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                yield value


def _shards(parameter: nn.Parameter) -> list[torch.Tensor]:
    """Return the tensors of which a rank holds its share. ZeRO-3 adds the gathered values, if of another dtype."""
    flat = get_flat_shard(parameter)
    if flat is None:
        return [parameter]
    gathered = [flat.gathered] if flat.full is None else []
    return gathered if flat.gathered is flat.padded else [flat.padded, *gathered]


def _replicated_bytes(parameter: nn.Parameter) -> int:
    """Return the bytes that a rank holds whatever the number of ranks."""
    flat = get_flat_shard(parameter)
    return 0 if flat is None or flat.full is None else flat.full.nbytes


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def _num_rows(parameter: torch.Tensor) -> int:
    """Return the number of equal rows that the engine never splits."""
    if get_flat_shard(parameter) is not None:
        return full_shape(parameter).numel()
    if not isinstance(parameter, DTensor):
        return parameter.shape[0]
    return parameter.shape[next((p.dim for p in parameter.placements if isinstance(p, Shard)), 0)]
