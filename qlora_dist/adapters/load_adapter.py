"""Putting an adapter's folder into a skeleton, and each rank's part of its values into a sharded model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_dist.adapters.attach import add_lora_layer, has_tied_head, is_lora_parameter
from qlora_dist.adapters.saved_adapter import SavedAdapter, missing_module_error
from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry
from qlora_dist.nf4.experts import NF4Experts
from qlora_dist.nf4.linear import NF4Linear
from qlora_dist.shard_view import flat_offset, local_slice, local_tensor


def attach_saved_adapter(model: PreTrainedModel, adapter: SavedAdapter, name: str, base: Path) -> None:
    """Put the matrices that a folder holds into a model on meta. Everything is frozen.

    Args:
        model: a skeleton; other adapters may be in it.
        adapter: the folder.
        name: that the adapter is to have in the model.
        base: the model's folder, for messages.

    Raises:
        UserError: the model lacks a matrix, or no adapter can be put on it.
    """
    config = adapter.peft_config()
    modules = {path.replace(".base_layer", ""): path for path, _ in model.named_modules()}
    for path, update in adapter.low_rank.items():
        owner, _, parameter = path.rpartition(".")
        if update.experts and parameter in _parameters(model, modules.get(owner)):
            raise UserError(f"{adapter.path}: adapts experts, which need a base in 4 bit; leave out --no-quantize")
        if path not in modules:
            raise missing_module_error(adapter, path, base)
        layer = model.get_submodule(path)
        inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        if not isinstance(inner, NF4Linear | NF4Experts | nn.Linear | Conv1D):
            raise UserError(
                f"{adapter.path}: adapts {path}, a {type(inner).__name__}, which is no linear layer; use the adapter "
                "with PEFT"
            )
        add_lora_layer(model, path, config, name, update.rank, update.alpha)
    model.requires_grad_(False)


def saved_entries_by_parameter(
    model: PreTrainedModel, adapter: SavedAdapter, name: str, base: Path
) -> dict[str, TensorEntry]:
    """The entries of the folder's file, by the model's name of the parameter.

    Args:
        model: on meta, with the adapter in it.
        adapter: the folder.
        name: that the adapter has in the model.
        base: the model's folder, for messages.

    Returns:
        Of LoRA's matrices, and of other parameters that were trained whole.

    Raises:
        UserError: a tensor has another shape than the model's, or is nothing that the model has.
    """
    parameters = dict(model.named_parameters())
    entries: dict[str, TensorEntry] = {}
    for path, update in adapter.low_rank.items():
        for part, entry in update.parts().items():
            parameter = f"{path}.{part}.{name}.weight"
            _check_shape(adapter, f"{path}.{part}", entry.shape, tuple(parameters[parameter].shape), base)
            entries[parameter] = entry
    whole = {name.replace(".base_layer.", "."): name for name in parameters if not is_lora_parameter(name)}
    for plain, entry in _without_tied_head(model, adapter, base).items():
        if plain not in whole:
            raise UserError(
                f"{adapter.path}: holds {plain}, which is nothing to be changed in {base}; give the model that it was "
                "trained on"
            )
        _check_shape(adapter, plain, entry.shape, tuple(parameters[whole[plain]].shape), base)
        entries[whole[plain]] = entry
    return entries


@torch.no_grad()
def read_local_shard(
    parameter: torch.Tensor, entry: TensorEntry, reader: SafetensorsReader, is_low_rank: bool
) -> torch.Tensor:
    """This rank's part of a saved tensor, in the type and on the device of the parameter's own.

    Args:
        parameter: sharded, with memory.
        entry: of the file.
        reader: of it.
        is_low_rank: read all of it and keep a part; else only the part, which lies there in one piece.
    """
    local = local_tensor(parameter)
    if is_low_rank:
        return local_slice(parameter, reader.read(entry)).to(local)
    values = torch.empty(local.numel(), dtype=entry.dtype)
    if local.numel():
        reader.read_into(values, entry, flat_offset(parameter) * entry.dtype.itemsize)
    return values.view(local.shape).to(local)


def _without_tied_head(model: PreTrainedModel, adapter: SavedAdapter, base: Path) -> Mapping[str, TensorEntry]:
    """What was trained whole, without the copy of a tied embedding that PEFT writes for the head."""
    if not has_tied_head(model):
        return adapter.whole
    paths = {id(module): path for path, module in model.named_modules()}
    head = f"{paths[id(model.get_output_embeddings())]}.weight"
    embedding = f"{paths[id(model.get_input_embeddings())]}.weight"
    if head not in adapter.whole:
        return adapter.whole
    if embedding not in adapter.whole or not _tensors_equal(adapter.whole[head], adapter.whole[embedding]):
        raise UserError(
            f"{adapter.path}: was trained with a head of its own ({head}), and the head of {base} is its embedding; "
            "merge them (qlora-dist merge), and use the merged folder"
        )
    return {name: entry for name, entry in adapter.whole.items() if name != head}


def _tensors_equal(one: TensorEntry, other: TensorEntry) -> bool:
    with SafetensorsReader() as reader:
        return one.shape == other.shape and torch.equal(reader.read(one), reader.read(other))


def _check_shape(
    adapter: SavedAdapter, name: str, shape: tuple[int, ...], expected: tuple[int, ...], base: Path
) -> None:
    if shape != expected:
        raise UserError(
            f"{adapter.path}: {name} has the shape {shape} where {base} asks for {expected}; give the model that it "
            "was trained on"
        )


def _parameters(model: nn.Module, path: str | None) -> set[str]:
    return set() if path is None else {name for name, _ in model.get_submodule(path).named_parameters(recurse=False)}
