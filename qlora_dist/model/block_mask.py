"""Which positions of packed rows see each other, in the form that torch's flex_attention takes.

Made from the boundaries rather than by torch's `create_block_mask`, as transformers does: that computes all pairs of
positions first, and needs a compiler. The sequences lie in order, so the ends of two blocks say all of their pairs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

FLEX_BLOCK_SIZE = 128  # positions: torch's own choice for its kernels


@lru_cache(maxsize=4)  # the layers of a forward pass share it, and those computed again in backward
def create_packed_block_mask(starts: torch.Tensor, length: int, window: int | None, device: torch.device) -> BlockMask:
    """Causal, within each sequence.

    Args:
        starts: of `boundaries`.
        length: of a row.
        window: a position sees so many, itself included; None: all of its sequence before it.
        device: where the mask goes.

    Returns:
        A mask of [batch, 1, length, length]. Blocks without a pair are left out, and blocks of nothing but pairs are
        marked as such.
    """
    batch = starts.shape[2]
    places = torch.arange(length, dtype=torch.int32).repeat(batch, 1)
    sequence = torch.searchsorted(starts[0, 0], places, right=True, out_int32=True)  # [batch, length], ascending
    blocks = torch.arange(-(-length // FLEX_BLOCK_SIZE))
    first, last = (
        sequence[:, place]
        for place in (blocks * FLEX_BLOCK_SIZE, (blocks * FLEX_BLOCK_SIZE + FLEX_BLOCK_SIZE - 1).clamp(max=length - 1))
    )
    block_distance = FLEX_BLOCK_SIZE * (
        blocks[:, None] - blocks
    )  # positions from the first of the keys to the first of the queries
    any_visible = (block_distance >= 0) & (last[:, None, :] >= first[:, :, None])
    all_visible = (block_distance > 0) & (first[:, None, :] == last[:, :, None])
    all_visible[:, -1] &= length % FLEX_BLOCK_SIZE == 0  # queries behind the end see nothing
    if window is not None:
        any_visible &= block_distance - (FLEX_BLOCK_SIZE - 1) < window
        all_visible &= block_distance + (FLEX_BLOCK_SIZE - 1) < window
    sequence = sequence.to(device)

    def mask_mod(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = (sequence[row, query] == sequence[row, key]) & (query >= key)
        return seen if window is None else seen & (query - key < window)

    mask = BlockMask.from_kv_blocks(
        *_block_counts_and_indices(any_visible & ~all_visible),
        *_block_counts_and_indices(all_visible),
        FLEX_BLOCK_SIZE,
        mask_mod,
        (length, length),
    )
    return mask.to(device)


@lru_cache(maxsize=2)
def create_packed_mask(starts: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
    """The pairs of `create_packed_block_mask`: bool[batch, 1, length, length] on the CPU."""
    mask = create_packed_block_mask(starts, length, window, torch.device("cpu"))
    return create_mask(mask.mask_mod, starts.shape[2], None, length, length, "cpu")


def _block_counts_and_indices(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From bool[batch, queries, keys]: int32[batch, 1, queries], how many there are of each block of queries, and
    int32[batch, 1, queries, keys], which, then the others.
    """
    order = blocks.int().argsort(dim=2, descending=True, stable=True)
    return blocks.sum(dim=2, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)
