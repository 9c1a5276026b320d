"""Tensors of integer weights in a folder: their shapes and types, checked against a layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.folder_tensors import PublishedWeights, damaged_tensor_error, format_tensor, require_tensor
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.formats.published_layout import PublishedLayout
from qlora_dist.io.safetensors_file import TensorEntry
from qlora_dist.nf4.quantize import TORCH_DTYPES

IN_16_BIT = "give a copy of the model in 16 bit"


def make_integer_entry(entries: Mapping[str, TensorEntry], stem: str, layout: PublishedLayout) -> PublishedWeightEntry:
    """Return the weight whose tensors' names begin with `stem`.

    Raises:
        UserError: a tensor is missing, or has another type or shape than the layout.
    """
    parts = []
    for part in layout.parts:
        name = stem + part.suffix
        entry = require_tensor(entries, name, stem + layout.parts[0].suffix)
        if (entry.dtype, entry.shape) != (part.dtype, part.shape):
            asked = format_tensor(part.dtype, part.shape)
            raise damaged_tensor_error(entry, name, f"is {format_tensor(entry.dtype, entry.shape)} instead of {asked}")
        parts.append(entry)
    return PublishedWeightEntry(layout, tuple(parts))


def collect_weights(
    entries: Mapping[str, TensorEntry], weights: Mapping[str, PublishedWeightEntry], others: Iterable[str] = ()
) -> PublishedWeights:
    """Return the weights, `....weight` by name, and the names of their tensors and of `others` in the folder."""
    stems = ((name.removesuffix(".weight"), weight.layout) for name, weight in weights.items())
    parts = {stem + part.suffix for stem, layout in stems for part in layout.parts}
    return PublishedWeights(weights=weights, tensors=frozenset(parts | (set(others) & entries.keys())))


def matrix_shape(entry: TensorEntry, name: str) -> tuple[int, int]:
    """Return the shape of a tensor that must be a matrix.

    Raises:
        UserError: it has another number of dimensions, or no elements.
    """
    if len(entry.shape) != 2 or not all(entry.shape):
        raise UserError(f"{entry.path}: {name} has shape {list(entry.shape)}, which is no matrix; {IN_16_BIT}")
    rows, columns = entry.shape
    return rows, columns


def scale_dtype(entry: TensorEntry, name: str) -> torch.dtype:
    """Return the type of scales, in which weights are dequantized.

    Raises:
        UserError: it is not a floating type of 16 or 32 bits.
    """
    if entry.dtype not in TORCH_DTYPES.values():
        raise UserError(
            f"{entry.path}: {name} is {format_tensor(entry.dtype, entry.shape)}, and scales of this type are not "
            f"supported; {IN_16_BIT}"
        )
    return entry.dtype


def config_error(entries: Mapping[str, TensorEntry], problem: str) -> UserError:
    """Return the error about a `quantization_config` that is not supported."""
    folder = next(iter(entries.values())).path.parent
    return UserError(f"{folder / 'config.json'}: quantization_config {problem}; {IN_16_BIT}")
