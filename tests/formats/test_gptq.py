"""If this fails, GPTQ weights get wrong values, or damaged ones are accepted."""

from __future__ import annotations

import pytest
import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.gptq import find_gptq_weights
from tests.helpers.published_integer_folders import IntegerFormat, gptq_format
from tests.helpers.published_weights import STEM, check_weight, find_in


def make_weight(rows: int = 24, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)


def check(made: IntegerFormat, rows: int = 24, columns: int = 64) -> None:
    parts = made.quantize(make_weight(rows, columns))
    values = made.dequantize(parts)
    step = parts[".scales"].float().t()[:, parts[".g_idx"].long()] if ".g_idx" in parts else 1.0
    assert ((values.float() - make_weight(rows, columns).float()).abs() <= 1.01 * step).all()  # the helper's own check
    check_weight(parts, find_gptq_weights, made.config, values)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_versions(bits, version, desc_act):
    check(gptq_format(bits, version=version, desc_act=desc_act), rows=32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_of_scales(dtype):
    check(gptq_format(dtype=dtype))


def test_without_index():
    check(gptq_format(has_index=False))


def test_large_weight_is_decoded_in_pieces():
    made = gptq_format(8)
    parts = made.quantize(make_weight(300, 4096))
    check_weight(parts, find_gptq_weights, made.config, made.dequantize(parts))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_extreme_codes(bits):
    made = gptq_format(bits)
    parts = made.quantize(make_weight(32, 64))
    generator = torch.Generator().manual_seed(0)
    for name in (".qweight", ".qzeros"):
        parts[name] = torch.randint(-(2**31), 2**31, parts[name].shape, generator=generator).to(torch.int32)
    check_weight(parts, find_gptq_weights, made.config, made.dequantize(parts))


def test_modules_may_have_their_own_number_of_bits():
    made = gptq_format(8)
    parts = made.quantize(make_weight())
    config = gptq_format(4).config | {"dynamic": {"+:.*down_proj": {"bits": 8}}}
    check_weight(parts, find_gptq_weights, config, made.dequantize(parts))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            {"checkpoint_format": "marlin"},
            {},
            "config.json: .* in the format 'marlin', which is arranged for one kernel",
        ),
        ({"bits": 5}, {}, "describes GPTQ in 5 bit, which is not supported; give a copy of the model in 16 bit"),
        ({}, {".scales": None}, r"qweight is there, but .*scales is missing; get the folder anew"),
        ({}, {".qzeros": None}, r"qweight is there, but .*qzeros is missing; get the folder anew"),
        ({"bits": 8}, {}, r"qweight is int32\[8, 24\] instead of int32\[16, 24\]; get the folder anew"),
        ({}, {".g_idx": torch.zeros(8, dtype=torch.int32)}, r"qweight is int32\[8, 24\] instead of int32\[1, 24\]"),
        ({}, {".g_idx": torch.zeros(64)}, r"g_idx is float32\[64\] instead of int32\[64\]; get the folder anew"),
        ({}, {".g_idx": None, ".scales": torch.ones(5, 24)}, "has 5 groups for 64 columns; get the folder anew"),
        ({}, {".qweight": torch.zeros(2, 8, 24, dtype=torch.int32)}, r"has shape \[2, 8, 24\], which is no matrix"),
        ({}, {".scales": torch.ones(4, 24, dtype=torch.float64)}, "scales of this type are not supported"),
    ],
)
def test_unsupported_weights_are_refused(config, changes, message):
    made = gptq_format()
    parts = {name: part for name, part in (made.quantize(make_weight()) | changes).items() if part is not None}
    tensors = {STEM + suffix: part for suffix, part in parts.items()}
    with pytest.raises(UserError, match=message):
        find_in(tensors, find_gptq_weights, made.config | config)
