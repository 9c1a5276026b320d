"""How trained tensors are cut, and the overlap of one cut with another: what resharding comes down to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cut:
    """A tensor over `shards` ranks: equal parts along `dim`, the last ones shorter or empty, as FSDP2 cuts."""

    shape: tuple[int, ...]
    """Of the whole."""
    dim: int
    shards: int

    def part(self, shard: int) -> tuple[int, int]:
        """Where shard `shard` begins along `dim`, and where it ends."""
        size = self.shape[self.dim]
        rows = -(-size // self.shards)
        return min(shard * rows, size), min((shard + 1) * rows, size)

    def part_shape(self, shard: int) -> tuple[int, ...]:
        """Shape of a shard."""
        start, stop = self.part(shard)
        return (*self.shape[: self.dim], stop - start, *self.shape[self.dim + 1 :])

    def numel(self, shard: int) -> int:
        """Elements of a shard."""
        count = 1
        for size in self.part_shape(shard):
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Copy:
    """A part of a saved shard, and where it goes in a wanted one. Ranges along each dimension."""

    shard: int
    """The saved one."""
    source: tuple[slice, ...]
    target: tuple[slice, ...]


def copies(saved: Cut, wanted: Cut, shard: int) -> Iterator[Copy]:
    """What to read to fill shard `shard` of `wanted`, whatever dimension and number of parts was saved."""
    assert saved.shape == wanted.shape
    want = _box(wanted, shard)
    for index in range(saved.shards):
        have = _box(saved, index)
        both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(have, want, strict=True)]
        if all(start < stop for start, stop in both):
            yield Copy(index, _relative(both, have), _relative(both, want))


def _box(cut: Cut, shard: int) -> list[tuple[int, int]]:
    box = [(0, size) for size in cut.shape]
    box[cut.dim] = cut.part(shard)
    return box


def _relative(box: list[tuple[int, int]], outer: list[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(box, outer, strict=True))
