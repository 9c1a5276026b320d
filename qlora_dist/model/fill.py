"""Filling a skeleton, sharded or not: every rank reads its own bytes, and no rank ever holds the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from qlora_dist.adapters.attach import first_values
from qlora_dist.adapters.lora import LoraNF4, row_norms
from qlora_dist.model.deal import Piece, gather_parts, local_range, pieces, quantize_in_turn
from qlora_dist.model.folder import ModelFolder
from qlora_dist.model.origins import Origin
from qlora_dist.model.skeleton import LossModel, decoder_layers, origin_names
from qlora_dist.nf4.checkpoint import QuantizedEntry
from qlora_dist.nf4.experts import NF4Experts
from qlora_dist.nf4.linear import NF4Linear
from qlora_dist.nf4.quantize import dequantize
from qlora_dist.nf4.safetensors_file import Reader


def fill(
    model: LossModel,
    folder: ModelFolder,
    device: torch.device,
    seed: int,
    replicas: DeviceMesh | None = None,
    offload_base: bool = False,
    progress: Callable[[int], None] | None = None,
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
        progress: called with the number of bytes of each read of this rank.

    Returns:
        Bytes read by this rank.
    """
    _materialize(model, device, offload_base)
    names = origin_names(model)
    parameter_names = {id(p): name for name, p in model.named_parameters()}
    to_quantize: list[Piece] = []
    with Reader(progress) as reader, torch.no_grad():
        source = _Source(folder, reader, replicas, device)
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                name = parameter_names[id(parameter)]
                if "lora_" in name:
                    _fill_adapter(parameter, name, seed)
                elif not isinstance(module, NF4Linear | NF4Experts) or parameter is not module.packed:
                    _fill_plain(parameter, model.origins[names[name]], source)
                elif folder.is_quantized:
                    weights = [folder.quantized[matrix.name] for matrix in model.matrices[names[name]]]
                    _fill_packed(parameter, module.layout.total_bytes, weights, source)
                else:
                    to_quantize += pieces(parameter, module.layout, model.matrices[names[name]])
        for name, buffer in model.named_buffers():
            if name in model.origins:
                _fill_plain(buffer, model.origins[name], source)
        quantize_in_turn(to_quantize, folder, reader, replicas, device)
        _fill_magnitudes(model)
        return reader.bytes_read


def _materialize(model: LossModel, device: torch.device, offload_base: bool) -> None:
    """Memory for what is on meta, and values for the buffers that no file holds (rotary frequencies)."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:  # as nn.Module.to_empty, with a choice of device
        on_host = offload_base and isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        return torch.empty_like(tensor, device="cpu" if on_host else device)

    model._apply(empty)
    owners = {name.rpartition(".")[0] for name, _ in model.named_non_persistent_buffers()}
    for owner in sorted(owners):
        with torch.no_grad():
            model._init_weights(model.get_submodule(owner))


@dataclass(frozen=True)
class _Source:
    """Where the bytes of a shard come from: the folder, and the ranks that hold the same shard."""

    folder: ModelFolder
    reader: Reader
    replicas: DeviceMesh | None
    device: torch.device

    def read(self, nbytes: int, read_part: Callable[[torch.Tensor, int], None]) -> torch.Tensor:
        """uint8[nbytes] of which `read_part(out, start)` reads any part. A collective of the replicas."""
        if self.replicas is None:
            whole = torch.empty(nbytes, dtype=torch.uint8)
            read_part(whole, 0)
            return whole
        count, index = self.replicas.size(), self.replicas.get_local_rank()
        part_bytes = -(-nbytes // count)
        part = torch.zeros(part_bytes, dtype=torch.uint8)
        first = min(index * part_bytes, nbytes)
        read_part(part[: min(part_bytes, nbytes - first)], first)
        return gather_parts(part.to(self.device), self.replicas)[:nbytes]


def _fill_packed(
    parameter: torch.Tensor, matrix_bytes: int, weights: Sequence[QuantizedEntry], source: _Source
) -> None:
    """The byte vectors of one or more matrices, one behind the other."""
    local, offset = local_range(parameter)
    if local.numel() == 0:
        return  # on the replicas too

    def read_part(out: torch.Tensor, start: int) -> None:
        for index, span, first in _across(matrix_bytes, offset[0] + start, out.numel()):
            weights[index].read_range(source.reader, out[span], first)

    local.copy_(source.read(local.numel(), read_part))


def _fill_plain(parameter: torch.Tensor, origin: Origin, source: _Source) -> None:
    """A parameter or buffer that is in no fewer bits than the folder has."""
    local, offset = local_range(parameter)
    if local.numel() == 0:
        return
    if origin.keys[0] in source.folder.quantized:
        _fill_dequantized(local, offset, source.folder.quantized[origin.keys[0]], source)
        return
    entries = [source.folder.entries[key] for key in origin.keys]
    row_bytes = sum(entry.nbytes for entry in entries) // max(1, parameter.shape[0] if parameter.dim() else 1)
    start_byte = offset[0] * row_bytes if offset else 0

    def read_part(out: torch.Tensor, start: int) -> None:
        for index, span, first in _across(entries[0].nbytes, start_byte + start, out.numel()):
            source.reader.read_into(out[span], entries[index], first)

    values = source.read(local.numel() * entries[0].dtype.itemsize, read_part).view(entries[0].dtype)
    local.copy_(values.view(local.shape))


def _fill_dequantized(local: torch.Tensor, offset: tuple[int, ...], weight: QuantizedEntry, source: _Source) -> None:
    """A parameter that this model keeps in 16 bit and the folder has in 4: the routers of sparse models, which others
    quantize. Every rank reads it whole; they are small.
    """
    packed = torch.empty(weight.layout.total_bytes, dtype=torch.uint8)
    weight.read_range(source.reader, packed, 0)
    whole = dequantize(packed.to(source.device), weight.layout, local.dtype)
    for dim, start in enumerate(offset):
        whole = whole.narrow(dim, start, local.shape[dim])
    local.copy_(whole)


def _across(size: int, start: int, nbytes: int) -> Iterator[tuple[int, slice, int]]:
    """Cut a range that crosses pieces of equal size: the piece's index, the span in the range, the start within."""
    position = start
    while position < start + nbytes:
        index, first = divmod(position, size)
        count = min(size - first, start + nbytes - position)
        yield index, slice(position - start, position - start + count), first
        position += count


def _fill_adapter(parameter: torch.Tensor, name: str, seed: int) -> None:
    whole = first_values(name, parameter.shape, seed)
    if whole is None:
        return
    local, offset = local_range(parameter)
    for dim, start in enumerate(offset):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), local.shape[dim])
    local.copy_(whole)


def _fill_magnitudes(model: LossModel) -> None:
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
