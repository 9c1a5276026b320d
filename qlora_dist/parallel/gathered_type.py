"""Gathered shards whose type is not that of the values that are trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlora_dist.compat.torch import foreach_copy_
from qlora_dist.shard_view import FlatShard


@torch.no_grad()
def update_gathered(shards: Sequence[FlatShard]) -> None:
    """Round the values of shards to the type in which they are gathered, where the types differ."""
    rounded = [shard for shard in shards if shard.gathered is not shard.padded]
    if rounded:
        foreach_copy_([shard.gathered for shard in rounded], [shard.padded for shard in rounded])
