"""If this fails, a run that goes on with another number of ranks gets somebody else's weights."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.checkpoint.shards import Cut, copies

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@given(shapes, st.data())
def test_every_element_is_read_once_and_goes_where_it_was(shape: tuple[int, ...], data: st.DataObject) -> None:
    saved, wanted = (
        Cut(shape, data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 11))) for _ in range(2)
    )
    whole = np.arange(np.prod(shape)).reshape(shape)

    def shard(cut: Cut, index: int) -> np.ndarray:
        start, stop = cut.part(index)
        return whole.take(range(start, stop), axis=cut.dim)

    for index in range(wanted.shards):
        out = np.full(wanted.part_shape(index), -1)
        for copy in copies(saved, wanted, index):
            assert (out[copy.target] == -1).all()
            out[copy.target] = shard(saved, copy.shard)[copy.source]
        np.testing.assert_array_equal(out, shard(wanted, index))


@given(shapes, st.data())
def test_parts_are_those_of_torch_chunk(shape: tuple[int, ...], data: st.DataObject) -> None:
    """FSDP2 cuts as torch.chunk does; what chunk leaves out is empty."""
    import torch

    cut = Cut(shape, data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 11)))
    chunks = torch.chunk(torch.empty(shape), cut.shards, dim=cut.dim)
    for index in range(cut.shards):
        start, stop = cut.part(index)
        assert stop - start == (chunks[index].shape[cut.dim] if index < len(chunks) else 0)
