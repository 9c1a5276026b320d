"""How the moments of a rank's shards lie in pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 256
"""Elements that share one absmax in 8-bit moments (bitsandbytes, `Optimizer2State`). In 32 bit, too, a page begins at a
multiple of it within a shard: vectorized kernels treat the last few elements of what they get in another way, and the
numbers would depend on the pages."""


@dataclass(frozen=True)
class Piece:
    """The part of a shard whose moments lie in one page."""

    shard: int
    start: int
    """First element, within the shard."""
    length: int
    """Elements."""
    at: int
    """First element, within the page."""


@dataclass(frozen=True)
class Page:
    """Moments of some elements, those of whole blocks."""

    elements: int
    """A multiple of BLOCK."""
    nbytes: int
    pieces: tuple[Piece, ...]


def block_bytes(bits: int) -> int:
    """Both moments of a block: fp32, or a byte each and their two absmax."""
    return 2 * 4 * BLOCK if bits == 32 else 2 * (BLOCK + 4)


def page_layout(sizes: Sequence[int], bits: int, page_bytes: int) -> list[Page]:
    """Cut the moments of shards into pages.

    All lie one behind the other as if they were one tensor, each shard from a new block on. All pages but the last
    hold equally many blocks, as many as `page_bytes` has room for.

    Args:
        sizes: elements of each shard.
        bits: 32 or 8.
        page_bytes: at least a block.
    """
    room = page_bytes // block_bytes(bits) * BLOCK
    assert room, "a page holds a block at least"
    pages: list[list[Piece]] = []
    at = room
    for shard, size in enumerate(sizes):
        start = 0
        while start < size:
            if at == room:
                pages.append([])
                at = 0
            length = min(size - start, room - at)
            pages[-1].append(Piece(shard, start, length, at))
            start += length
            at += -(-length // BLOCK) * BLOCK
    elements = [room] * (len(pages) - 1) + [at] * bool(pages)
    return [
        Page(count, count // BLOCK * block_bytes(bits), tuple(pieces))
        for count, pieces in zip(elements, pages, strict=True)
    ]
