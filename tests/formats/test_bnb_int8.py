"""If this fails, weights in 8 bit of bitsandbytes get other values than bitsandbytes gives them."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.bnb_int8 import find_bnb_int8_weights
from tests.helpers.published_integer_folders import bnb_int8_format
from tests.helpers.published_weights import STEM, check_weight, find_in


def make_weight(rows: int = 24, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)


def test_values():
    made = bnb_int8_format()
    parts = made.quantize(make_weight())
    values = made.dequantize(parts)
    step = parts[".SCB"].unsqueeze(1) / 127
    assert ((values - make_weight().float()).abs() <= step).all()  # the helper's own check
    for dtype in (torch.float32, torch.bfloat16):
        check_weight(parts, find_bnb_int8_weights, made.config, values.to(dtype))


def test_tensors_that_bitsandbytes_saves():
    layer = bnb.nn.Linear8bitLt(64, 24, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": make_weight().float()})
    layer = layer.to(torch.float16).to("cpu")
    layer.weight = bnb.nn.Int8Params(make_weight().half(), requires_grad=False, has_fp16_weights=False).to("cpu")
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(make_weight().half())
    layer.weight.data, layer.weight.CB, layer.weight.SCB = codes, codes, scales
    saved = {f".{name}": tensor for name, tensor in layer.state_dict().items()}
    assert saved.keys() == {".weight", ".SCB", ".weight_format"}
    check_weight(saved, find_bnb_int8_weights, {}, bnb.functional.int8_vectorwise_dequant(codes, scales))


def test_other_weights_of_a_folder_are_left_out():
    tensors = {f"{STEM}.weight": torch.zeros(24, 1, dtype=torch.uint8), f"{STEM}.weight.absmax": torch.ones(3)}
    found = find_in(tensors, find_bnb_int8_weights, {})
    assert not found.weights
    assert not found.tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({".SCB": None}, r"weight is there, but .*SCB is missing; get the folder anew"),
        ({".SCB": torch.ones(64)}, r"SCB is float32\[64\] instead of float32\[24\]; get the folder anew"),
        ({".SCB": torch.ones(24).half()}, r"SCB is float16\[24\] instead of float32\[24\]; get the folder anew"),
        ({".weight": torch.zeros(2, 24, 64, dtype=torch.int8)}, r"has shape \[2, 24, 64\], which is no matrix; give"),
        ({".weight_format": torch.tensor(2, dtype=torch.uint8)}, "arranged for an old kernel of bitsandbytes, which"),
    ],
)
def test_unsupported_weights_are_refused(changes, message):
    made = bnb_int8_format()
    parts = {name: part for name, part in (made.quantize(make_weight()) | changes).items() if part is not None}
    tensors = {STEM + suffix: part for suffix, part in parts.items()}
    with pytest.raises(UserError, match=message):
        find_in(tensors, find_bnb_int8_weights, {})
