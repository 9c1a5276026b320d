"""Weights for a model on the meta device: every rank reads its own bytes, and no rank ever holds the whole model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from qlora_dist.adapters.attach import is_adapter_parameter
from qlora_dist.compat.torch import map_tensors
from qlora_dist.io.read_ahead import ReadProgress
from qlora_dist.layers.embedding import QuantizedVocabMixin
from qlora_dist.layers.experts import QuantizedExperts
from qlora_dist.layers.linear import QuantizedLinear
from qlora_dist.model.buffers import check_buffers_initialized, init_buffers
from qlora_dist.model.meta_model import LossModel, transformers_names
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_scatter import ScatteredMatrix, quantize_and_scatter, scattered_matrices
from qlora_dist.model.shard_reader import LocalShard, ShardReader, WriteShard
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.shard_view import flat_offset, full_shape, get_flat_shard, local_slice, local_tensor


class ParameterStore(Protocol):
    """A store of parameters' values. The parameters themselves stay on the meta device."""

    def __contains__(self, name: str) -> bool:
        """Return whether the store keeps the parameter of that name."""

    def write(self, name: str, first: int, values: torch.Tensor) -> None:
        """Write values, [n] of any dtype and device, to this rank's shard from element `first` on."""


def load_weights(
    model: LossModel,
    folder: ModelFolder,
    device: torch.device,
    *,
    replicas: DeviceMesh | None = None,
    offload_base: bool = False,
    parameter_store: ParameterStore | None = None,
    on_read: Callable[[ReadProgress], None] | None = None,
) -> int:
    """Give every parameter and buffer memory and, except for the adapters' parameters, its value.

    All ranks of the default process group call this. A rank reads only the bytes of its shards. If other ranks hold the
    same shards, each of these ranks reads a part and they exchange the parts. So all ranks together read the folder
    once.

    A weight that is quantized while it is loaded is read whole by one rank, its owner. The owner quantizes it, sends
    each rank its shard, and drops it. The ranks take turns as owners, and the owners of a round quantize in parallel.

    `replicas` is the 1-D mesh of the ranks that hold the same shard of the base; None if there is one copy. With
    `offload_base`, frozen parameters stay on the CPU, and the engine copies them to the device. `parameter_store` keeps
    frozen parameters that hold no memory themselves. `on_read` is called after each read of this rank.

    Returns:
        Bytes read by this rank.
    """
    stored_names = {
        name for name, _ in model.named_parameters() if parameter_store is not None and name in parameter_store
    }
    materialize(model, device, offload_base=offload_base, stored_names=stored_names)
    check_buffers_initialized(model)
    origins, names = model.origins, transformers_names(model)
    parameter_names = {id(p): name for name, p in model.named_parameters()}
    shards: list[LocalShard] = []
    trained: list[LocalShard] = []
    to_quantize: list[ScatteredMatrix] = []
    to_dequantize: list[tuple[torch.Tensor, tuple[str, ...], WriteShard]] = []
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                name = parameter_names[id(parameter)]
                if is_adapter_parameter(name):
                    continue
                if parameter_store is not None and name in stored_names:
                    write: WriteShard = partial(parameter_store.write, name)
                else:
                    write = partial(_write_local, local_tensor(parameter))
                if (
                    isinstance(module, QuantizedLinear | QuantizedExperts | QuantizedVocabMixin)
                    and parameter is module.packed
                ):
                    matrices = model.matrices[names[name]]
                    if module.layout == folder.packed_layout(matrices[0].name):
                        shards.append(_local_shard(parameter, tuple(matrix.name for matrix in matrices), folder, write))
                    else:
                        assert isinstance(module.layout, NF4Layout), "a published format is never made on loading"
                        to_quantize += scattered_matrices(parameter, module.layout, matrices, write)
                elif folder.packed((source := origins[names[name]]).keys[0]) is not None:
                    to_dequantize.append((parameter, source.keys, write))
                else:
                    # the ranks that share the base's shards hold different shards of a trained parameter
                    group = trained if parameter.requires_grad else shards
                    group.append(_local_shard(parameter, origins[names[name]].keys, folder, write))
        buffers = [(buffer, origins[name].keys) for name, buffer in model.named_buffers() if name in origins]
        shards += [_local_shard(buffer, keys, folder, partial(_write_local, buffer)) for buffer, keys in buffers]
        own = [piece.matrix for piece in to_quantize[dist.get_rank() :: dist.get_world_size()]]
        with ShardReader(folder, shards, own, replicas, device, on_read) as reader:
            reader.load_shards()
            for parameter, keys, write in to_dequantize:
                _load_dequantized(parameter, keys, reader, write)
            quantize_and_scatter(to_quantize, reader, replicas, device)
        with ShardReader(folder, trained, [], None, device) as trained_reader:
            trained_reader.load_shards()
        return reader.bytes_read + trained_reader.bytes_read


def materialize(
    model: LossModel, device: torch.device, *, offload_base: bool = False, stored_names: Collection[str] = ()
) -> None:
    """Allocate memory for the tensors on the meta device, and set the buffers that no file holds (rotary frequencies).

    Parameters in `stored_names` stay on the meta device.
    """
    stored_ids = {id(parameter) for name, parameter in model.named_parameters() if name in stored_names}

    def empty(tensor: torch.Tensor) -> torch.Tensor:  # as nn.Module.to_empty, with a choice of device
        if id(tensor) in stored_ids:
            return torch.empty_like(tensor)
        if get_flat_shard(tensor) is not None:
            return tensor  # its shard has memory already, and the parameter itself holds nothing
        on_host = offload_base and isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        return torch.empty_like(tensor, device="cpu" if on_host else device)

    map_tensors(model, empty)
    init_buffers(model)


def _write_local(local: torch.Tensor, first: int, values: torch.Tensor) -> None:
    local.view(-1)[first : first + values.numel()].copy_(values)


def _local_shard(parameter: torch.Tensor, keys: tuple[str, ...], folder: ModelFolder, put: WriteShard) -> LocalShard:
    local, first = local_tensor(parameter), flat_offset(parameter)
    if folder.packed(keys[0]) is not None:
        return LocalShard(local, keys, first, put)
    itemsize = folder.entries[keys[0]].dtype.itemsize
    in_folder = sum(folder.entries[key].nbytes for key in keys) // itemsize
    if full_shape(parameter).numel() > in_folder:  # rows that are added to an embedding or a head
        local = local.view(-1)[: max(0, in_folder - first)]
    return LocalShard(local, keys, first * itemsize, put)


def _load_dequantized(parameter: torch.Tensor, keys: tuple[str, ...], reader: ShardReader, put: WriteShard) -> None:
    """Load a parameter that the folder has quantized and this model keeps in 16 bit.

    Such are the routers of sparse models, and output heads, which other programs quantize. Every rank reads them whole.
    """
    whole = torch.cat([reader.read_dequantized(key, local_tensor(parameter).dtype) for key in keys])
    if added := full_shape(parameter)[0] - whole.shape[0]:  # rows that are added to an embedding or a head
        whole = torch.nn.functional.pad(whole, (0, 0, 0, added))
    put(0, local_slice(parameter, whole).reshape(-1))
