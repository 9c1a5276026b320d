"""Tensors of a folder in a published format: experts of stacked tensors, and errors about tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qlora_dist.errors import UserError
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.io.safetensors_file import TensorEntry


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """Weights of a folder that are in a published format."""

    weights: Mapping[str, PublishedWeightEntry] = field(default_factory=dict)
    """Weights by name, as a 16-bit folder has them: `....weight`, or TENSOR.3.weight for expert 3 of a stacked
    TENSOR."""
    tensors: frozenset[str] = frozenset()
    """Names of all tensors that belong to these weights, or that only the format needs, such as scales of inputs."""


def slice_expert(entry: TensorEntry, expert: int) -> TensorEntry:
    """Return the part of a stacked tensor, [experts, ...], that belongs to one expert."""
    nbytes = entry.nbytes // entry.shape[0]
    start = entry.start + expert * nbytes
    return replace(entry, shape=entry.shape[1:], start=start, stop=start + nbytes)


def require_tensor(entries: Mapping[str, TensorEntry], name: str, weight: str) -> TensorEntry:
    """Return the entry of a tensor that belongs to the tensor `weight`.

    Raises:
        UserError: it is missing.
    """
    if name not in entries:
        raise UserError(f"{entries[weight].path}: {weight} is there, but {name} is missing; get the folder anew")
    return entries[name]


def damaged_tensor_error(entry: TensorEntry, name: str, problem: str) -> UserError:
    """Return the error about a tensor whose type or shape does not fit to its format."""
    return UserError(f"{entry.path}: {name} {problem}; get the folder anew")
