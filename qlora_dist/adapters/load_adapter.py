"""Saved adapter on a model without weights, and each rank's shards of its values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_dist.adapters.attach import add_lora_layer, has_tied_head, is_adapter_parameter
from qlora_dist.adapters.saved_adapter import SavedAdapter, SavedTokenRows, missing_module_error
from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry, tensors_equal
from qlora_dist.layers.embedding import vocab_weight_names
from qlora_dist.layers.experts import QuantizedExperts
from qlora_dist.layers.linear import QuantizedLinear
from qlora_dist.layers.token_rows import TOKEN_ROWS_NAME, TokenRows
from qlora_dist.shard_view import flat_offset, local_slice, local_tensor


def attach_saved_adapter(model: PreTrainedModel, adapter: SavedAdapter, name: str, base: Path) -> None:
    """Add the layers of a saved adapter to a model on meta, which may have others, and freeze all parameters.

    `name` is the adapter's name in the model. Messages name `base`, the model's folder.

    Raises:
        UserError: the model lacks a matrix, or a matrix cannot have an adapter.
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
        if not isinstance(inner, QuantizedLinear | QuantizedExperts | nn.Linear | Conv1D):
            raise UserError(
                f"{adapter.path}: adapts {path}, a {type(inner).__name__}, which is no linear layer; use the adapter "
                "with PEFT"
            )
        add_lora_layer(model, path, config, name, update.rank, update.alpha)
    model.requires_grad_(False)


def saved_entries_by_parameter(
    model: PreTrainedModel, adapter: SavedAdapter, name: str, base: Path
) -> dict[str, TensorEntry]:
    """Return the adapter's tensors, LoRA's and fully trained ones, by the name of the parameter in the model.

    The arguments are the same as in `attach_saved_adapter`, which has added the layers.

    Raises:
        UserError: a tensor has another shape than the model's parameter, or the model has no such parameter.
    """
    parameters = dict(model.named_parameters())
    entries: dict[str, TensorEntry] = {}
    for path, update in adapter.low_rank.items():
        for part, entry in update.entries().items():
            parameter = f"{path}.{part}.{name}.weight"
            _check_shape(adapter, f"{path}.{part}", entry.shape, tuple(parameters[parameter].shape), base)
            entries[parameter] = entry
    names = {name.replace(".base_layer.", "."): name for name in parameters if not is_adapter_parameter(name)}
    for plain, entry in _without_tied_head(model, adapter, base).items():
        if plain not in names:
            raise UserError(
                f"{adapter.path}: holds {plain}, which {base} has no parameter for; give the model that it was "
                "trained on"
            )
        _check_shape(adapter, plain, entry.shape, tuple(parameters[names[plain]].shape), base)
        entries[names[plain]] = entry
    for path, rows in adapter.token_rows.items():
        parameter = f"{path}.{TOKEN_ROWS_NAME}"
        _check_shape(adapter, path, rows.entry.shape[1:], tuple(parameters[parameter].shape[1:]), base)
        entries[parameter] = rows.entry
    return entries


@torch.no_grad()
def read_local_shard(
    parameter: torch.Tensor, entry: TensorEntry, reader: SafetensorsReader, *, is_low_rank: bool
) -> torch.Tensor:
    """Read this rank's shard of a saved tensor, in the type and on the device of the parameter, which has memory.

    A low-rank tensor is read whole and sliced, and so are rows of tokens. Other shards are contiguous, and only they
    are read.
    """
    local = local_tensor(parameter)
    if is_low_rank:
        return local_slice(parameter, reader.read(entry)).to(local)
    values = torch.empty(local.numel(), dtype=entry.dtype)
    if local.numel():
        reader.read_into(values, entry, flat_offset(parameter) * entry.dtype.itemsize)
    return values.view(local.shape).to(local)


@torch.no_grad()
def read_token_rows_shard(
    parameter: torch.Tensor, rows: TokenRows, saved: SavedTokenRows, reader: SafetensorsReader
) -> torch.Tensor:
    """Return this rank's shard of an adapter's rows. Rows that the adapter does not hold keep the shard's values.

    `parameter` has the values of the base, and `rows` names the rows of all loaded adapters.
    """
    positions = [rows.ids.index(token) for token in saved.ids]
    values = torch.zeros(len(rows.ids), saved.entry.shape[1])
    values[positions] = reader.read(saved.entry).float()
    is_saved = torch.zeros(values.shape, dtype=torch.bool)
    is_saved[positions] = True
    local = local_tensor(parameter)
    return torch.where(
        local_slice(parameter, is_saved).to(local.device), local_slice(parameter, values).to(local), local
    )


def _without_tied_head(model: PreTrainedModel, adapter: SavedAdapter, base: Path) -> Mapping[str, TensorEntry]:
    """Return the fully trained tensors without the copy of a tied embedding that PEFT saves for the head."""
    if not has_tied_head(model):
        return adapter.full_tensors
    embedding, head = vocab_weight_names(model)
    if head not in adapter.full_tensors:
        return adapter.full_tensors
    if embedding not in adapter.full_tensors or not tensors_equal(
        adapter.full_tensors[head], adapter.full_tensors[embedding]
    ):
        raise UserError(
            f"{adapter.path}: was trained with a head of its own ({head}), but the head of {base} is tied to its "
            "embedding; merge them (qlora-dist merge), and use the merged folder"
        )
    return {name: entry for name, entry in adapter.full_tensors.items() if name != head}


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
