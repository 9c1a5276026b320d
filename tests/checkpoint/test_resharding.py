"""If this fails, a run that goes on with another number of ranks gets somebody else's weights."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.checkpoint.resharding import FLAT_DIM, ShardSpec, copy_ops

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@given(shapes, st.data())
def test_every_element_is_read_once_and_goes_where_it_was(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Along any dimension, as FSDP2 cuts, or as one row, as ZeRO-3 does, and from one to the other."""
    saved, wanted = (
        ShardSpec(shape, data.draw(st.integers(FLAT_DIM, len(shape) - 1)), data.draw(st.integers(1, 11)))
        for _ in range(2)
    )
    whole = torch.arange(math.prod(shape)).view(shape)

    def shard(cut: ShardSpec, index: int) -> torch.Tensor:
        start, stop = cut.part(index)
        if cut.dim == FLAT_DIM:
            return whole.view(-1)[start:stop].clone()
        return whole.narrow(cut.dim, start, stop - start).contiguous()

    for index in range(wanted.shards):
        out = torch.full(wanted.shard_shape(index), -1)
        for copy in copy_ops(saved, wanted, index):
            assert (copy.target.of(out) == -1).all()
            copy.target.of(out).copy_(copy.source.of(shard(saved, copy.shard)))
        assert torch.equal(out, shard(wanted, index))


@given(shapes, st.data())
def test_parts_are_those_of_torch_chunk(shape: tuple[int, ...], data: st.DataObject) -> None:
    """FSDP2 cuts as torch.chunk does; what chunk leaves out is empty."""
    cut = ShardSpec(shape, data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 11)))
    chunks = torch.chunk(torch.empty(shape), cut.shards, dim=cut.dim)
    for index in range(cut.shards):
        start, stop = cut.part(index)
        assert stop - start == (chunks[index].shape[cut.dim] if index < len(chunks) else 0)
