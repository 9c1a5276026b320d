"""If this fails, weights in NVFP4 get other values than compressed-tensors or ModelOpt gives them."""

from __future__ import annotations

import pytest
import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.find_published import find_published_weights
from tests.helpers.published_folders import FloatFormat, compressed_float_format, modelopt_format
from tests.helpers.published_weights import STEM, check_weight, find_in


def compressed() -> FloatFormat:
    return compressed_float_format("nvfp4-pack-quantized")


@pytest.mark.parametrize("shape", [(40, 64), (1, 16), (3, 48)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("make", [compressed, modelopt_format])
def test_values(make, dtype, shape):
    made = make()
    parts = made.quantize(torch.randn(shape))
    if make is modelopt_format and dtype != torch.bfloat16:
        return  # only compressed-tensors rounds to bf16 first
    check_weight(parts, find_published_weights, made.config, made.dequantize(parts).to(dtype))


@pytest.mark.parametrize("make", [compressed, modelopt_format])
def test_all_scales_and_codes(make):
    made = make()
    parts = made.quantize(torch.randn(127, 512))
    codes = torch.arange(256, dtype=torch.uint8).repeat(127, 1)
    scales = torch.arange(127, dtype=torch.uint8).unsqueeze(1).repeat(1, 32).view(torch.float8_e4m3fn)
    name = ".weight" if make is modelopt_format else ".weight_packed"
    parts |= {name: codes, ".weight_scale": scales}
    check_weight(parts, find_published_weights, made.config, made.dequantize(parts))


def test_activation_scales_belong_to_the_format():
    made = compressed()
    parts = made.quantize(torch.randn(4, 32))
    inputs = {".input_global_scale": torch.ones(1), ".k_scale": torch.ones(1)}
    check_weight(parts | inputs, find_published_weights, made.config, made.dequantize(parts))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (compressed, {".weight_global_scale": None}, r"but .*weight_global_scale is missing; get the folder anew"),
        (compressed, {".weight_scale": None}, r"but .*weight_scale is missing; get the folder anew"),
        (compressed, {".weight_global_scale": torch.tensor(1.0)}, r"is float32\[\] instead of float32\[1\]; get"),
        (compressed, {".weight_scale": torch.ones(4, 2)}, r"is float32\[4, 2\] instead of float8_e4m3fn\[4, 2\]; get"),
        (compressed, {".weight_packed": torch.zeros(4, 20, dtype=torch.uint8)}, r"shape \[4, 20\], not rows of groups"),
        (modelopt_format, {".weight_scale_2": None}, r"but .*weight_scale_2 is missing; get the folder anew"),
        (modelopt_format, {".weight_scale_2": torch.ones(4)}, r"is float32\[4\] instead of float32\[1\]; get"),
        (modelopt_format, {".pre_quant_scale": torch.ones(4)}, r"pre_quant_scale belongs to a weight in a layout that"),
    ],
)
def test_damaged_weights_are_refused(make, changes, message):
    made = make()
    parts = made.quantize(torch.randn(4, 32)) | changes
    tensors = {STEM + suffix: part for suffix, part in parts.items() if part is not None}
    with pytest.raises(UserError, match=message):
        find_in(tensors, find_published_weights, made.config)
