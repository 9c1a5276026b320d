"""How trained tensors are cut, and the overlap of one cut with another: what resharding comes down to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FLAT_DIM = -1
"""In place of a dimension: the elements are cut as one row, as ZeRO-3 cuts."""

_Slices = tuple[tuple[int, int], ...]
"""A range along each dimension."""


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """A tensor over `shards` ranks: equal parts along `dim`, the last ones shorter or empty, as both engines cut."""

    shape: tuple[int, ...]
    """Of the whole."""
    dim: int
    """Or ROW."""
    shards: int

    def part(self, shard: int) -> tuple[int, int]:
        """Where shard `shard` begins along `dim`, and where it ends."""
        size = math.prod(self.shape) if self.dim == FLAT_DIM else self.shape[self.dim]
        rows = -(-size // self.shards)
        return min(shard * rows, size), min((shard + 1) * rows, size)

    def shard_shape(self, shard: int) -> tuple[int, ...]:
        """Shape of a shard."""
        start, stop = self.part(shard)
        if self.dim == FLAT_DIM:
            return (stop - start,)
        return (*self.shape[: self.dim], stop - start, *self.shape[self.dim + 1 :])

    def numel(self, shard: int) -> int:
        """Elements of a shard."""
        return math.prod(self.shard_shape(shard))

    def slices(self, shard: int) -> Iterator[tuple[int, _Slices]]:
        """The boxes of the whole that a shard consists of, one behind the other; of each, the shard's first element."""
        start, stop = self.part(shard)
        if start == stop:
            return
        if self.dim == FLAT_DIM:
            first = 0
            for box in _flat_slices(self.shape, start, stop):
                yield first, box
                first += _volume(box)
            return
        whole = [(0, size) for size in self.shape]
        whole[self.dim] = start, stop
        yield 0, tuple(whole)


@dataclass(frozen=True, slots=True)
class ShardLocation:
    """A part of a shard: among its elements in a row, from `first` on, a box of `shape`, and ranges within that."""

    first: int
    shape: tuple[int, ...]
    ranges: tuple[slice, ...]

    def of(self, shard: torch.Tensor) -> torch.Tensor:
        """The part as a view of a contiguous shard."""
        return shard.view(-1)[self.first : self.first + math.prod(self.shape)].view(self.shape)[self.ranges]


@dataclass(frozen=True, slots=True)
class CopyOp:
    """A part of a saved shard, and where it goes in a wanted one."""

    shard: int
    """The saved one."""
    source: ShardLocation
    target: ShardLocation


def copy_ops(saved: ShardSpec, target_spec: ShardSpec, shard: int) -> Iterator[CopyOp]:
    """What to read to fill shard `shard` of `target_spec`, whatever dimension and number of parts was saved."""
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
    """Elements of a row as boxes, in their order: the rest of a slice, whole slices, the beginning of one."""
    if start == stop:
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    inner = math.prod(shape[1:])
    first, last = start // inner, stop // inner
    if start % inner or first == last:
        end = min(stop, (first + 1) * inner)
        for box in _flat_slices(shape[1:], start - first * inner, end - first * inner):
            yield ((first, first + 1), *box)
        yield from _flat_slices(shape, end, stop)
        return
    yield ((first, last), *((0, size) for size in shape[1:]))
    yield from _flat_slices(shape, last * inner, stop)


def _shard_location(first: int, outer: _Slices, box: _Slices) -> ShardLocation:
    ranges = tuple(slice(start - begin, stop - begin) for (start, stop), (begin, _) in zip(box, outer, strict=True))
    return ShardLocation(first, tuple(stop - start for start, stop in outer), ranges)


def _volume(box: _Slices) -> int:
    return math.prod(stop - start for start, stop in box)
