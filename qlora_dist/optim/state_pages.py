"""The pages that hold a rank's optimizer states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STATE_BLOCK_SIZE = 256
"""Elements that share one absmax in 8-bit states (bitsandbytes, `Optimizer2State`).

In 32 bit, too, a page begins at a multiple of it within a shard. Vectorized kernels treat the last few elements of a
tensor differently, so the numbers would depend on the pages otherwise."""


@dataclass(frozen=True)
class PageSlice:
    """A part of a shard whose optimizer states lie in one page."""

    shard: int
    start: int
    """First element within the shard."""
    length: int
    page_start: int
    """First element within the page."""


@dataclass(frozen=True)
class StatePage:
    """A page: the optimizer states of whole blocks."""

    elements: int
    """Number of elements, a multiple of `STATE_BLOCK_SIZE`."""
    nbytes: int
    slices: tuple[PageSlice, ...]


def state_block_bytes(bits: int) -> int:
    """Return the bytes of a block's `exp_avg` and `exp_avg_sq`: two fp32, or two bytes and a share of two absmax."""
    return 2 * 4 * STATE_BLOCK_SIZE if bits == 32 else 2 * (STATE_BLOCK_SIZE + 4)


def page_layout(sizes: Sequence[int], bits: int, page_bytes: int) -> list[StatePage]:
    """Split the optimizer states of shards into pages.

    The states of all shards follow each other as in one tensor, and each shard begins with a new block. All pages but
    the last hold the same number of blocks, as many as `page_bytes` has room for. `sizes` counts elements per shard.
    """
    room = page_bytes // state_block_bytes(bits) * STATE_BLOCK_SIZE
    assert room, "a page holds at least one block"
    pages: list[list[PageSlice]] = []
    page_start = room
    for shard, size in enumerate(sizes):
        start = 0
        while start < size:
            if page_start == room:
                pages.append([])
                page_start = 0
            length = min(size - start, room - page_start)
            pages[-1].append(PageSlice(shard, start, length, page_start))
            start += length
            page_start += -(-length // STATE_BLOCK_SIZE) * STATE_BLOCK_SIZE
    elements = [room] * (len(pages) - 1) + [page_start] * bool(pages)
    return [
        StatePage(count, count // STATE_BLOCK_SIZE * state_block_bytes(bits), tuple(slices))
        for count, slices in zip(elements, pages, strict=True)
    ]
