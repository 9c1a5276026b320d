"""Tensors of a folder in a published format: experts of stacked tensors, and errors about tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.io.safetensors_file import TensorEntry
from qlora_dist.nf4.quant_state import expert_key


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


def each_matrix(name: str, *tensors: TensorEntry) -> Iterator[tuple[str, tuple[TensorEntry, ...]]]:
    """Yield each matrix of a tensor `name` with its name among the weights, and its part of all `tensors`.

    The first of `tensors` holds the codes: a matrix, or [experts, out_features, in_features]. The others belong to it.

    Raises:
        UserError: the codes have another number of dimensions, or the others another number of experts.
    """
    codes = tensors[0]
    if len(codes.shape) == 2:
        yield name, tensors
        return
    if len(codes.shape) != 3 or any(tensor.shape[:1] != codes.shape[:1] for tensor in tensors):
        shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors)
        raise damaged_tensor_error(codes, name, f"and its scales have shapes {shapes}, which fit no matrices")
    for expert in range(codes.shape[0]):
        yield expert_key(name, expert), tuple(slice_expert(tensor, expert) for tensor in tensors)


def check_tensor(entry: TensorEntry, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Check the type and the shape of a tensor.

    Raises:
        UserError: it has others.
    """
    if (entry.dtype, entry.shape) != (dtype, shape):
        raise damaged_tensor_error(
            entry, name, f"is {format_tensor(entry.dtype, entry.shape)} instead of {format_tensor(dtype, shape)}"
        )


def format_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """Return type and shape of a tensor, such as int32[128, 16]."""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


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
