"""Filling a skeleton, sharded or not: every rank reads its own bytes, and no rank ever holds the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from qlora_dist.adapters.attach import first_values
from qlora_dist.adapters.lora import LoraNF4, row_norms
from qlora_dist.model.folder import ModelFolder
from qlora_dist.model.skeleton import checkpoint_name, decoder_layers
from qlora_dist.model.stream import ShardInFolder, Stream
from qlora_dist.nf4.linear import NF4Linear
from qlora_dist.nf4.read_ahead import Reading


def fill(
    model: PreTrainedModel,
    folder: ModelFolder,
    device: torch.device,
    seed: int,
    replicas: DeviceMesh | None = None,
    offload_base: bool = False,
    progress: Callable[[Reading], None] | None = None,
) -> int:
    """Give every parameter and buffer of a skeleton its value.

    Called on all ranks of the default process group. Of a parameter that is cut into shards a rank reads the bytes of
    its shard; where the base has several copies, those who hold the same shard read a part of it each and exchange
    them, so that all ranks together read the folder once. A weight to be quantized on the way is read whole by one
    rank, its owner (they take turns), which quantizes it, sends each rank its shard, and drops it; the owners of a
    round quantize side by side.

    Args:
        model: on meta, its parameters plain or DTensors.
        folder: where the weights are.
        device: where the model goes.
        seed: of the adapters' first values.
        replicas: 1-D mesh of the ranks that hold the same shard of the base as this one; None: there are no others.
        offload_base: keep the frozen parameters on the CPU; the engine copies them to the device.
        progress: called after each read of this rank.

    Returns:
        Bytes read by this rank.
    """
    _materialize(model, device, offload_base)
    names = {id(p): name for name, p in model.named_parameters()}
    to_quantize: list[tuple[str, NF4Linear]] = []
    shards: list[ShardInFolder] = []
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                name = names[id(parameter)]
                if "lora_" in name:
                    _fill_adapter(parameter, name, seed)
                elif isinstance(module, NF4Linear) and parameter is module.packed and not folder.is_quantized:
                    to_quantize.append((checkpoint_name(name), module))
                else:
                    shards.append(_shard(parameter, checkpoint_name(name), folder))
        shards += [_shard(buffer, name, folder) for name, buffer in model.named_buffers() if name in folder.entries]
        own = [key for key, _ in to_quantize[dist.get_rank() :: dist.get_world_size()]]
        with Stream(folder, shards, own, replicas, device, progress) as stream:
            stream.fill_shards()
            _quantize_in_turn(to_quantize, stream, device)
        _fill_magnitudes(model)
        return stream.bytes_read


def local_range(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """This rank's part of a parameter, and where in the whole it starts, by dimension."""
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


def _materialize(model: PreTrainedModel, device: torch.device, offload_base: bool) -> None:
    """Memory for what is on meta, and values for the buffers that no file holds (rotary frequencies)."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:  # as nn.Module.to_empty, with a choice of device
        on_host = offload_base and isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        return torch.empty_like(tensor, device="cpu" if on_host else device)

    model._apply(empty)
    owners = {name.rpartition(".")[0] for name, _ in model.named_non_persistent_buffers()}
    for owner in sorted(owners):
        with torch.no_grad():
            model._init_weights(model.get_submodule(owner))


def _shard(parameter: torch.Tensor, key: str, folder: ModelFolder) -> ShardInFolder:
    local, offset = local_range(parameter)
    if key in folder.quantized:
        return ShardInFolder(local, key, offset[0])
    entry = folder.entries[key]
    return ShardInFolder(local, key, offset[0] * (entry.nbytes // entry.shape[0]) if offset else 0)


def _fill_adapter(parameter: torch.Tensor, name: str, seed: int) -> None:
    whole = first_values(name, parameter.shape, seed)
    if whole is None:
        return
    local, offset = local_range(parameter)
    for dim, start in enumerate(offset):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), local.shape[dim])
    local.copy_(whole)


def _quantize_in_turn(weights: list[tuple[str, NF4Linear]], stream: Stream, device: torch.device) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for first in range(0, len(weights), world_size):
        turn = weights[first : first + world_size]
        packed = stream.quantize_next(turn[rank][1].layout) if rank < len(turn) else None
        for owner, (_, module) in enumerate(turn):
            _scatter(packed if rank == owner else None, owner, module.packed, device)


def _scatter(packed: torch.Tensor | None, owner: int, parameter: torch.Tensor, device: torch.device) -> None:
    """Each rank gets its shard of a byte vector that the owner holds; replicas get the same one."""
    local, _ = local_range(parameter)
    shards = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
    shard_bytes = -(-parameter.numel() // shards)
    received = torch.empty(shard_bytes, dtype=torch.uint8, device=device)
    chunks = None
    if packed is not None:
        padded = nn.functional.pad(packed, (0, shard_bytes * shards - packed.numel()))
        # ranks that are neighbours share a copy of the base: the shard of rank r is r modulo the number of shards
        chunks = [padded[(r % shards) * shard_bytes :][:shard_bytes] for r in range(dist.get_world_size())]
    dist.scatter(received, chunks, src=owner)
    local.copy_(received[: local.numel()])


def _fill_magnitudes(model: PreTrainedModel) -> None:
    """DoRA's magnitudes start as the row norms of W, layer by layer, each gathered for the moment."""
    if not any("lora_magnitude_vector" in name for name, _ in model.named_parameters()):
        return
    for layer in decoder_layers(model):
        sharded = hasattr(layer, "unshard")
        norms = {}
        if sharded:
            layer.unshard()
        for name, module in layer.named_modules():
            if isinstance(module, LoraNF4):
                for adapter in module.lora_magnitude_vector:
                    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                    weight = module.get_base_layer().dequantize(a.dtype)
                    norms[f"{name}.lora_magnitude_vector.{adapter}.weight"] = row_norms(
                        weight, a, b, module.scaling[adapter]
                    )
        if sharded:
            layer.reshard()
        for name, norm in norms.items():
            local, offset = local_range(layer.get_parameter(name))
            local.copy_(norm[offset[0] : offset[0] + local.shape[0]])
