"""How the moments of a rank's shards lie in pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STATE_BLOCK_SIZE = 256
"""Elements that share one absmax in 8-bit moments (bitsandbytes, `Optimizer2State`). In 32 bit, too, a page begins at a
multiple of it within a shard: vectorized kernels treat the last few elements of what they get in another way, and the
numbers would depend on the pages."""


@dataclass(frozen=True)
class PageSlice:
    """The part of a shard whose moments lie in one page."""

    shard: int
    start: int
    """First element, within the shard."""
    length: int
    """Elements."""
    at: int
    """First element, within the page."""


@dataclass(frozen=True)
class StatePage:
    """Moments of some elements, those of whole blocks."""

    elements: int
    """A multiple of BLOCK."""
    nbytes: int
    pieces: tuple[PageSlice, ...]


def state_block_bytes(bits: int) -> int:
    """Both moments of a block: fp32, or a byte each and their two absmax."""
    return 2 * 4 * STATE_BLOCK_SIZE if bits == 32 else 2 * (STATE_BLOCK_SIZE + 4)


def page_layout(sizes: Sequence[int], bits: int, page_bytes: int) -> list[StatePage]:
    """Cut the moments of shards into pages.

    All lie one behind the other as if they were one tensor, each shard from a new block on. All pages but the last
    hold equally many blocks, as many as `page_bytes` has room for.

    Args:
        sizes: elements of each shard.
        bits: 32 or 8.
        page_bytes: at least a block.
    """
    room = page_bytes // state_block_bytes(bits) * STATE_BLOCK_SIZE
    assert room, "a page holds a block at least"
    pages: list[list[PageSlice]] = []
    at = room
    for shard, size in enumerate(sizes):
        start = 0
        while start < size:
            if at == room:
                pages.append([])
                at = 0
            length = min(size - start, room - at)
            pages[-1].append(PageSlice(shard, start, length, at))
            start += length
            at += -(-length // STATE_BLOCK_SIZE) * STATE_BLOCK_SIZE
    elements = [room] * (len(pages) - 1) + [at] * bool(pages)
    return [
        StatePage(count, count // STATE_BLOCK_SIZE * state_block_bytes(bits), tuple(pieces))
        for count, pieces in zip(elements, pages, strict=True)
    ]
