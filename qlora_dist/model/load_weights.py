"""Filling a skeleton, sharded or not: every rank reads its own bytes, and no rank ever holds the model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from qlora_dist.adapters.attach import init_lora_weight, is_lora_parameter
from qlora_dist.adapters.lora import NF4LoraLinear, dora_weight_norm
from qlora_dist.compat.torch import map_tensors
from qlora_dist.io.read_ahead import ReadProgress
from qlora_dist.model.buffers import check_buffers_initialized, init_buffers
from qlora_dist.model.meta_model import LossModel, get_decoder_layers, transformers_names
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_scatter import ScatteredMatrix, quantize_and_scatter, scattered_matrices
from qlora_dist.model.shard_reader import LocalShard, ShardReader, WriteShard
from qlora_dist.nf4.embedding import NF4VocabMixin
from qlora_dist.nf4.experts import NF4Experts
from qlora_dist.nf4.linear import NF4Linear
from qlora_dist.shard_view import flat_offset, full_shape, get_flat_shard, local_slice, local_tensor


class ParameterStore(Protocol):
    """What keeps the values of some parameters itself; these stay on meta."""

    def __contains__(self, name: str) -> bool:
        """Whether it keeps the parameter of that name."""

    def put(self, name: str, first: int, values: torch.Tensor) -> None:
        """Keep values: [n], of any type and device, as the elements of this rank's shard from `first` on."""


def load_weights(
    model: LossModel,
    folder: ModelFolder,
    device: torch.device,
    seed: int | None,
    replicas: DeviceMesh | None = None,
    offload_base: bool = False,
    progress: Callable[[ReadProgress], None] | None = None,
    parameter_store: ParameterStore | None = None,
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
        seed: of the adapters' first values; None: they get none, others do that.
        replicas: 1-D mesh of the ranks that hold the same shard of the base as this one; None: there are no others.
        offload_base: keep the frozen parameters on the CPU; the engine copies them to the device.
        progress: called after each read of this rank.
        parameter_store: keeps frozen parameters that are to hold no memory themselves.

    Returns:
        Bytes read by this rank.
    """
    stored_names = {
        name for name, _ in model.named_parameters() if parameter_store is not None and name in parameter_store
    }
    materialize(model, device, offload_base, stored_names)
    check_buffers_initialized(model)
    origins, names = model.origins, transformers_names(model)
    parameter_names = {id(p): name for name, p in model.named_parameters()}
    shards: list[LocalShard] = []
    trained: list[LocalShard] = []
    to_quantize: list[ScatteredMatrix] = []
    to_dequantize: list[tuple[torch.Tensor, str, WriteShard]] = []
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                name = parameter_names[id(parameter)]
                if parameter_store is not None and name in stored_names:
                    write: WriteShard = partial(parameter_store.put, name)
                else:
                    write = partial(_write_local, local_tensor(parameter))
                if is_lora_parameter(name):
                    if seed is not None:
                        _init_adapter(parameter, name, seed)
                elif isinstance(module, NF4Linear | NF4Experts | NF4VocabMixin) and parameter is module.packed:
                    matrices = model.matrices[names[name]]
                    if matrices[0].name in folder.quantized:
                        shards.append(_local_shard(parameter, tuple(matrix.name for matrix in matrices), folder, write))
                    else:
                        to_quantize += scattered_matrices(parameter, module.layout, matrices, write)
                elif (key := origins[names[name]].keys[0]) in folder.quantized:
                    to_dequantize.append((parameter, key, write))
                elif parameter.requires_grad:
                    trained.append(_local_shard(parameter, origins[names[name]].keys, folder, write))
                else:
                    shards.append(_local_shard(parameter, origins[names[name]].keys, folder, write))
        buffers = [(buffer, origins[name].keys) for name, buffer in model.named_buffers() if name in origins]
        shards += [_local_shard(buffer, keys, folder, partial(_write_local, buffer)) for buffer, keys in buffers]
        own = [piece.matrix for piece in to_quantize[dist.get_rank() :: dist.get_world_size()]]
        with ShardReader(folder, shards, own, replicas, device, progress) as stream:
            stream.load_shards()
            for parameter, key, write in to_dequantize:
                _load_dequantized(parameter, key, stream, write)
            quantize_and_scatter(to_quantize, stream, replicas, device)
        with ShardReader(
            folder, trained, [], None, device
        ) as trained_reader:  # the replicas of the base have other shards of these
            trained_reader.load_shards()
        if seed is not None:
            _init_dora_magnitudes(model)
        return stream.bytes_read + trained_reader.bytes_read


def materialize(
    model: LossModel, device: torch.device, offload_base: bool = False, stored_names: Collection[str] = ()
) -> None:
    """Memory for what is on meta, and values for the buffers that no file holds (rotary frequencies)."""
    stored_ids = {id(parameter) for name, parameter in model.named_parameters() if name in stored_names}

    def empty(tensor: torch.Tensor) -> torch.Tensor:  # as nn.Module.to_empty, with a choice of device
        if id(tensor) in stored_ids:
            return torch.empty_like(tensor)
        if get_flat_shard(tensor) is not None:
            return tensor  # its part is there, and it holds nothing itself
        on_host = offload_base and isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        return torch.empty_like(tensor, device="cpu" if on_host else device)

    map_tensors(model, empty)
    init_buffers(model)


def _write_local(local: torch.Tensor, first: int, values: torch.Tensor) -> None:
    local.view(-1)[first : first + values.numel()].copy_(values)


def _local_shard(parameter: torch.Tensor, keys: tuple[str, ...], folder: ModelFolder, put: WriteShard) -> LocalShard:
    local, first = local_tensor(parameter), flat_offset(parameter)
    if keys[0] in folder.quantized or not first:
        return LocalShard(local, keys, first, put)
    nbytes = sum(folder.entries[key].nbytes for key in keys)
    return LocalShard(local, keys, first * nbytes // full_shape(parameter).numel(), put)


def _load_dequantized(parameter: torch.Tensor, key: str, stream: ShardReader, put: WriteShard) -> None:
    """A parameter that this model keeps in 16 bit and the folder has in 4: the routers of sparse models, which others
    quantize. Every rank reads it whole; they are small.
    """
    whole = stream.read_dequantized(key, local_tensor(parameter).dtype)
    put(0, local_slice(parameter, whole).reshape(-1))


def _init_adapter(parameter: torch.Tensor, name: str, seed: int) -> None:
    whole = init_lora_weight(name, full_shape(parameter), seed)
    if whole is not None:
        local_tensor(parameter).copy_(local_slice(parameter, whole))


def _init_dora_magnitudes(model: LossModel) -> None:
    """DoRA's magnitudes start as the row norms of W, layer by layer, each gathered for the moment."""
    if not any("lora_magnitude_vector" in name for name, _ in model.named_parameters()):
        return
    for layer in get_decoder_layers(model):
        norms = {}
        if isinstance(layer, FSDPModule):
            layer.unshard()
        for name, module in layer.named_modules():
            if isinstance(module, NF4LoraLinear):
                assert isinstance(module.base_layer, NF4Linear)
                for adapter in module.lora_magnitude_vector:
                    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                    weight = module.base_layer.dequantize(a.dtype)
                    norms[f"{name}.lora_magnitude_vector.{adapter}.weight"] = dora_weight_norm(
                        weight, a, b, module.scaling[adapter]
                    )
        if isinstance(layer, FSDPModule):
            layer.reshard()
        for name, norm in norms.items():
            parameter = layer.get_parameter(name)
            local_tensor(parameter).copy_(local_slice(parameter, norm))
