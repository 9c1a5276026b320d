"""The shards of trained tensors, and the copies that turn saved shards into shards of another layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FLAT_DIM = -1
"""A `ShardSpec.dim` that says that the elements are split as one flat row, as ZeRO-3 does."""

_Slices = tuple[tuple[int, int], ...]
"""A range along each dimension."""


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """A tensor's equal shards along `dim`, of which the last ones may be shorter or empty."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dim: int
    """Dimension that is sharded, or `FLAT_DIM`."""
    shards: int

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Return the start and the end of shard `shard` along `dim`."""
        size = math.prod(self.shape) if self.dim == FLAT_DIM else self.shape[self.dim]
        rows = -(-size // self.shards)
        return min(shard * rows, size), min((shard + 1) * rows, size)

    def shard_shape(self, shard: int) -> tuple[int, ...]:
        start, stop = self.shard_range(shard)
        if self.dim == FLAT_DIM:
            return (stop - start,)
        return (*self.shape[: self.dim], stop - start, *self.shape[self.dim + 1 :])

    def shard_numel(self, shard: int) -> int:
        return math.prod(self.shard_shape(shard))

    def slices(self, shard: int) -> Iterator[tuple[int, _Slices]]:
        """Yield the slices of the whole tensor that form a shard, each with its first element in the shard."""
        start, stop = self.shard_range(shard)
        if start == stop:
            return
        if self.dim == FLAT_DIM:
            first = 0
            for part in _flat_slices(self.shape, start, stop):
                yield first, part
                first += math.prod(end - begin for begin, end in part)
            return
        whole = [(0, size) for size in self.shape]
        whole[self.dim] = start, stop
        yield 0, tuple(whole)


@dataclass(frozen=True, slots=True)
class ShardLocation:
    """A part of a shard: `ranges` of the tensor of `shape` that begins at element `first` of the flat shard."""

    first: int
    shape: tuple[int, ...]
    ranges: tuple[slice, ...]

    def view(self, shard: torch.Tensor) -> torch.Tensor:
        """Return the part as a view of a contiguous shard."""
        return shard.view(-1)[self.first : self.first + math.prod(self.shape)].view(self.shape)[self.ranges]


@dataclass(frozen=True, slots=True)
class CopyOp:
    """A copy from a part of a saved shard to a part of another shard."""

    shard: int
    """Index of the saved shard."""
    source: ShardLocation
    target: ShardLocation


def copy_ops(saved: ShardSpec, target_spec: ShardSpec, shard: int) -> Iterator[CopyOp]:
    """Yield the copies that fill shard `shard` of `target_spec` from saved shards of any layout."""
    assert saved.shape == target_spec.shape
    for index in range(saved.shards):
        for (source, saved_slices), (target, target_slices) in product(
            saved.slices(index), list(target_spec.slices(shard))
        ):
            overlap = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(saved_slices, target_slices, strict=True))
            if all(start < stop for start, stop in overlap):
                yield CopyOp(
                    index,
                    _shard_location(source, saved_slices, overlap),
                    _shard_location(target, target_slices, overlap),
                )


def _flat_slices(shape: tuple[int, ...], start: int, stop: int) -> Iterator[_Slices]:
    """Yield a range of a tensor's flat row as slices of the tensor, in order."""
    if start == stop:
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    inner = math.prod(shape[1:])
    first, last = start // inner, stop // inner
    if start % inner or first == last:
        end = min(stop, (first + 1) * inner)
        for part in _flat_slices(shape[1:], start - first * inner, end - first * inner):
            yield ((first, first + 1), *part)
        yield from _flat_slices(shape, end, stop)
        return
    yield ((first, last), *((0, size) for size in shape[1:]))
    yield from _flat_slices(shape, last * inner, stop)


def _shard_location(first: int, outer: _Slices, inner: _Slices) -> ShardLocation:
    ranges = tuple(slice(start - begin, stop - begin) for (start, stop), (begin, _) in zip(inner, outer, strict=True))
    return ShardLocation(first, tuple(stop - start for start, stop in outer), ranges)
