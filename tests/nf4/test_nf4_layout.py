"""If this fails, parts of a quantized weight overwrite each other, or a GPU holds more than 4.127 bits per weight."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.nf4.nf4_layout import BLOCK_SIZES, NF4Layout

layouts = st.builds(
    NF4Layout,
    shape=st.lists(st.integers(1, 5000), min_size=1, max_size=3).map(tuple),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
)


def test_bits_per_weight_equal_the_papers():
    layout = NF4Layout(shape=(4096, 4096))
    numel, bits = 4096 * 4096, 4 + 8 / 64 + 32 / (64 * 256)
    # every part fills its 16 bytes but the last, one fp32 offset
    assert layout.total_bytes == numel * bits / 8 + 16
    assert f"{8 * layout.total_bytes / numel:.3f}" == "4.127"


@pytest.mark.parametrize(("block_size", "bits"), [(32, 5.0), (64, 4.5), (128, 4.25), (4096, 4 + 32 / 4096)])
def test_bits_per_weight_without_double_quantization(block_size, bits):
    layout = NF4Layout(shape=(4096, 4096), block_size=block_size, double_quant=False)
    assert 8 * layout.total_bytes / layout.numel == bits


def test_a_layout_computed_by_hand():
    layout = NF4Layout(shape=(3, 35), block_size=32)  # 105 weights: 53 bytes of codes, 4 blocks
    assert (layout.numel, layout.num_blocks) == (105, 4)
    assert (layout.codes, layout.absmax) == (slice(0, 53), slice(64, 68))
    assert (layout.nested_absmax, layout.offset) == (slice(80, 84), slice(96, 100))
    assert layout.total_bytes == 112


@given(layouts)
def test_sizes_of_parts(layout):
    def size(part: slice) -> int:
        return part.stop - part.start

    weights = math.prod(layout.shape)
    blocks = math.ceil(weights / layout.block_size)
    assert size(layout.codes) == math.ceil(weights / 2)
    assert size(layout.absmax) == (blocks if layout.double_quant else 4 * blocks)
    assert size(layout.nested_absmax) == (4 * math.ceil(blocks / 256) if layout.double_quant else 0)
    assert size(layout.offset) == (4 if layout.double_quant else 0)


@given(layouts)
def test_parts_are_aligned_and_do_not_overlap(layout):
    parts = [layout.codes, layout.absmax, layout.nested_absmax, layout.offset]
    assert parts[0].start == 0
    for part, following in zip(parts, [*parts[1:], slice(layout.total_bytes, None)], strict=True):
        assert part.stop <= following.start < part.stop + 16, "no overlap, and no more than the padding between them"
        assert following.start % 16 == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"shape": (4, 4), "block_size": 48}, "48"), ({"shape": (4, 0)}, "no elements"), ({"shape": ()}, "no elements")],
)
def test_impossible_layouts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NF4Layout(**arguments)
