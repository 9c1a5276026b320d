"""If this fails, a run that resumes with another number of ranks gets wrong weights."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.checkpoint.resharding import FLAT_DIM, ShardSpec, copy_ops

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@given(shapes, st.data())
def test_every_element_is_copied_once_to_its_place(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Saved and target shards are along any dimension (FSDP2) or flat (ZeRO-3)."""
    saved, target = (
        ShardSpec(shape, data.draw(st.integers(FLAT_DIM, len(shape) - 1)), data.draw(st.integers(1, 11)))
        for _ in range(2)
    )
    whole = torch.arange(math.prod(shape)).view(shape)

    def shard(spec: ShardSpec, index: int) -> torch.Tensor:
        start, stop = spec.shard_range(index)
        if spec.dim == FLAT_DIM:
            return whole.view(-1)[start:stop].clone()
        return whole.narrow(spec.dim, start, stop - start).contiguous()

    for index in range(target.shards):
        out = torch.full(target.shard_shape(index), -1)
        for copy in copy_ops(saved, target, index):
            assert (copy.target.view(out) == -1).all()
            copy.target.view(out).copy_(copy.source.view(shard(saved, copy.shard)))
        assert torch.equal(out, shard(target, index))


@given(shapes, st.data())
def test_shards_equal_torch_chunk(shape: tuple[int, ...], data: st.DataObject) -> None:
    """FSDP2 splits as torch.chunk does. Chunks that torch leaves out are empty."""
    spec = ShardSpec(shape, data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 11)))
    chunks = torch.chunk(torch.empty(shape), spec.shards, dim=spec.dim)
    for index in range(spec.shards):
        start, stop = spec.shard_range(index)
        assert stop - start == (chunks[index].shape[spec.dim] if index < len(chunks) else 0)
