"""Block masks of packed rows for torch's flex_attention.

transformers uses torch's `create_block_mask`, which computes all pairs of positions first and needs a compiler. Here a
mask is made from the sequences' starts. Sequences lie in order, so the ends of two blocks determine all their pairs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

FLEX_BLOCK_SIZE = 128  # positions: torch's own choice for its kernels


@lru_cache(maxsize=4)  # all layers of a step share it, also when they are recomputed in backward
def create_packed_block_mask(starts: torch.Tensor, length: int, window: int | None, device: torch.device) -> BlockMask:
    """Create the mask of causal attention within each sequence, [batch, 1, length, length].

    `starts` is the result of `sequence_starts`. A position sees `window` positions, itself included, or without a
    window all of its sequence before it. Blocks without a visible pair are left out. Blocks in which all pairs are
    visible are marked as full.
    """
    batch = starts.shape[2]
    positions = torch.arange(length, dtype=torch.int32).repeat(batch, 1)
    sequence = torch.searchsorted(starts[0, 0], positions, right=True, out_int32=True)  # [batch, length], ascending
    blocks = torch.arange(-(-length // FLEX_BLOCK_SIZE))
    first = sequence[:, blocks * FLEX_BLOCK_SIZE]
    last = sequence[:, (blocks * FLEX_BLOCK_SIZE + FLEX_BLOCK_SIZE - 1).clamp(max=length - 1)]
    # positions from the first key of a block to the first query
    block_distance = FLEX_BLOCK_SIZE * (blocks[:, None] - blocks)
    any_visible = (block_distance >= 0) & (last[:, None, :] >= first[:, :, None])
    all_visible = (block_distance > 0) & (first[:, None, :] == last[:, :, None])
    all_visible[:, -1] &= length % FLEX_BLOCK_SIZE == 0  # queries past the end see nothing
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
    """Return the visible pairs of `create_packed_block_mask` as bool[batch, 1, length, length] on the CPU."""
    mask = create_packed_block_mask(starts, length, window, torch.device("cpu"))
    return create_mask(mask.mask_mod, starts.shape[2], None, length, length, "cpu")


def _block_counts_and_indices(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many key blocks each query block sees, int32[batch, 1, queries], and their order.

    The order is int32[batch, 1, queries, keys]: the visible of `blocks`, bool[batch, queries, keys], precede the
    others.
    """
    order = blocks.int().argsort(dim=2, descending=True, stable=True)
    return blocks.sum(dim=2, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)
