"""If this fails, the states of two shards overlap, or a number depends on the pages."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.optim.state_pages import STATE_BLOCK_SIZE, page_layout, state_block_bytes


@settings(deadline=None)
@given(
    sizes=st.lists(st.one_of(st.just(0), st.integers(1, 3000)), max_size=12),
    bits=st.sampled_from([8, 32]),
    page_bytes=st.integers(4096, 40000),
)
def test_every_element_has_its_place(sizes: list[int], bits: int, page_bytes: int) -> None:
    pages = page_layout(sizes, bits, page_bytes)
    seen = [0] * len(sizes)
    for number, page in enumerate(pages):
        assert page.nbytes <= page_bytes and page.elements % STATE_BLOCK_SIZE == 0
        assert page.nbytes == page.elements // STATE_BLOCK_SIZE * state_block_bytes(bits)
        assert page.elements == pages[0].elements or number == len(pages) - 1
        end = 0
        for piece in page.slices:
            assert (
                piece.page_start == -(-end // STATE_BLOCK_SIZE) * STATE_BLOCK_SIZE
            )  # each slice follows the one before, from a new block on
            assert piece.start == seen[piece.shard] and piece.start % STATE_BLOCK_SIZE == 0
            seen[piece.shard] += piece.length
            end = piece.page_start + piece.length
        assert -(-end // STATE_BLOCK_SIZE) * STATE_BLOCK_SIZE == page.elements  # nothing is left between pages
    assert seen == sizes
