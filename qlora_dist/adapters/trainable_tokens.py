"""Trained rows of embedding and head in PEFT's configuration (`trainable_token_indices`), and on a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.adapters.saved_adapter import SavedAdapter
from qlora_dist.errors import UserError
from qlora_dist.layers.embedding import vocab_weight_names
from qlora_dist.layers.token_rows import use_token_rows


def vocab_modules(model: PreTrainedModel) -> dict[str, nn.Embedding | nn.Linear]:
    """Return the embedding, and the output head unless it is tied, by path."""
    modules = {name.removesuffix(".weight"): None for name in vocab_weight_names(model)}
    found = {path: module for path, module in model.named_modules() if path in modules}
    return {path: module for path, module in found.items() if any(True for _ in module.parameters())}


def trainable_token_indices(
    model: PreTrainedModel, ids: Sequence[int], modules_to_save: Collection[str]
) -> dict[str, list[int]] | None:
    """Return the value of PEFT's key: the rows of embedding and untied head, without modules that are trained whole."""
    if not ids:
        return None
    return {path: list(ids) for path in vocab_modules(model) if path not in modules_to_save} or None


def set_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Record in a model's configuration how many rows embedding and head will have, as transformers' resizing does."""
    model.config.get_text_config().vocab_size = rows


def grow_vocab_weight(module: nn.Module, rows: int) -> None:
    """Replace the weight of an embedding or output head on meta by one with more rows, and the bias likewise."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        grown = torch.empty(rows, *parameter.shape[1:], dtype=parameter.dtype, device=parameter.device)
        setattr(module, name, nn.Parameter(grown, requires_grad=parameter.requires_grad))
    setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", rows)


def attach_vocabulary(
    model: PreTrainedModel,
    modules_to_save: Collection[str],
    token_indices: Mapping[str, Sequence[int]],
    vocabulary: int,
) -> None:
    """Give embedding and head of a model on meta the rows that an adapter adds or trains, without values.

    Modules that are trained whole get at least `vocabulary` rows.
    """
    modules = vocab_modules(model)
    for path, module in modules.items():
        if path in modules_to_save and module.weight.shape[0] < vocabulary:
            grow_vocab_weight(module, vocabulary)
    for path, ids in token_indices.items():
        use_token_rows(modules[path], ids, path)


def attach_saved_vocabulary(model: PreTrainedModel, adapters: Sequence[SavedAdapter], base: Path) -> None:
    """Give embedding and head of a model on meta the rows that saved adapters add or train, without values.

    Call it before anything else of the adapters is attached. Messages name `base`, the model's folder.

    Raises:
        UserError: an adapter needs rows that neither it nor the base has, or two adapters train a module differently.
    """
    modules = vocab_modules(model)
    ids: dict[str, set[int]] = {path: set() for path in modules}
    base_rows = {path: module.weight.shape[0] for path, module in modules.items()}
    vocabulary = max(base_rows.values())
    for adapter in adapters:
        vocabulary = max(vocabulary, saved_vocabulary(adapter, base_rows, base))
        for path, rows in adapter.token_rows.items():
            ids[path].update(rows.ids)
    for path, module in modules.items():
        whole = [adapter for adapter in adapters if f"{path}.weight" in adapter.full_tensors]
        if whole and ids[path]:
            raise UserError(
                f"{whole[0].path}: trains {path} whole, and another adapter trains rows of it; give one of them"
            )
        if whole and module.weight.shape[0] < vocabulary:
            grow_vocab_weight(module, vocabulary)
        elif ids[path]:
            use_token_rows(module, sorted(ids[path] | {*range(module.weight.shape[0], max(ids[path]) + 1)}), path)
    if vocabulary > max(base_rows.values()):
        set_vocabulary(model, vocabulary)


def saved_vocabulary(adapter: SavedAdapter, base_rows: Mapping[str, int], base: Path) -> int:
    """Return the rows of embedding and head with which an adapter was trained, at least the base's number.

    `base_rows` has the rows of the base's embedding and untied head, by path.

    Raises:
        UserError: the adapter trains rows of another module, or not all rows that the base lacks.
    """
    if unknown := sorted(adapter.token_rows.keys() - base_rows.keys()):
        raise UserError(
            f"{adapter.path}: trains rows of {unknown[0]}, which is no embedding or untied head of {base}; give the "
            "model that it was trained on"
        )
    vocabulary = max(base_rows.values())
    for path in base_rows:
        if (weight := adapter.full_tensors.get(f"{path}.weight")) is not None:
            vocabulary = max(vocabulary, weight.shape[0])
        if path in adapter.token_rows:
            vocabulary = max(vocabulary, max(adapter.token_rows[path].ids, default=-1) + 1)
    for path, rows in base_rows.items():
        weight, saved = adapter.full_tensors.get(f"{path}.weight"), adapter.token_rows.get(path)
        added = range(rows, vocabulary)
        has_all = {*saved.ids}.issuperset(added) if saved is not None else not added
        if not (has_all if weight is None else weight.shape[0] == vocabulary or not added):
            raise UserError(
                f"{adapter.path}: was trained on a model with {vocabulary:,} tokens, and neither it nor {base} has all "
                f"of these rows of {path}; give the resized model with --base"
            )
    return vocabulary
