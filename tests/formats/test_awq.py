"""If this fails, AWQ weights get wrong values, or damaged ones are accepted."""

from __future__ import annotations

import pytest
import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.awq import find_awq_weights
from tests.helpers.published_integer_folders import awq_format
from tests.helpers.published_weights import STEM, check_weight, find_in


def make_weight(rows: int = 24, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_of_scales(dtype):
    made = awq_format(dtype)
    parts = made.quantize(make_weight())
    values = made.dequantize(parts)
    step = parts[".scales"].float().t().repeat_interleave(16, 1)
    assert ((values.float() - make_weight().float()).abs() <= 1.01 * step).all()  # the helper's own check
    check_weight(parts, find_awq_weights, made.config, values)


def test_extreme_codes_and_pieces():
    made = awq_format()
    parts = made.quantize(make_weight(296, 4096))
    generator = torch.Generator().manual_seed(0)
    for name in (".qweight", ".qzeros"):
        parts[name] = torch.randint(-(2**31), 2**31, parts[name].shape, generator=generator).to(torch.int32)
    check_weight(parts, find_awq_weights, made.config, made.dequantize(parts))


def test_order_of_a_word():
    """The first 4 bits are row 0, the next are row 2: AWQ's order is 0, 2, 4, 6, 1, 3, 5, 7."""
    word = sum(row << (4 * place) for place, row in enumerate([0, 2, 4, 6, 1, 3, 5, 7]))
    parts = {
        ".qweight": torch.full((16, 1), word, dtype=torch.int32),
        ".qzeros": torch.zeros(1, 1, dtype=torch.int32),
        ".scales": torch.ones(1, 8, dtype=torch.float16),
    }
    expected = torch.arange(8, dtype=torch.float16).unsqueeze(1).expand(8, 16)
    check_weight(parts, find_awq_weights, awq_format().config, expected)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"version": "GEMV"}, {}, "config.json: quantization_config describes AWQ in 4 bit of the layout 'gemv', of"),
        ({"bits": 8}, {}, "describes AWQ in 8 bit of the layout 'gemm', of which only 4 bit of 'gemm' is supported; "),
        ({}, {".scales": None}, r"qweight is there, but .*scales is missing; get the folder anew"),
        ({}, {".qzeros": torch.zeros(4, 4, dtype=torch.int32)}, r"qzeros is int32\[4, 4\] instead of int32\[4, 3\]"),
        ({}, {".scales": torch.ones(5, 24)}, "has 5 groups for 64 columns; get the folder anew"),
        ({}, {".scales": torch.ones(4, 24, dtype=torch.int8)}, "scales of this type are not supported; give a copy"),
    ],
)
def test_unsupported_weights_are_refused(config, changes, message):
    made = awq_format()
    parts = {name: part for name, part in (made.quantize(make_weight()) | changes).items() if part is not None}
    tensors = {STEM + suffix: part for suffix, part in parts.items()}
    with pytest.raises(UserError, match=message):
        find_in(tensors, find_awq_weights, made.config | config)
