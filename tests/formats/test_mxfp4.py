"""If this fails, weights in MXFP4 get other values than transformers or compressed-tensors gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers.integrations.mxfp4 import FP4_VALUES as VALUES_OF_TRANSFORMERS
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_dist.errors import UserError
from qlora_dist.formats.find_published import find_published_weights
from qlora_dist.formats.fp4 import FP4_VALUES, fp4_values
from qlora_dist.formats.mxfp4 import Mxfp4Layout, find_mxfp4_weights
from qlora_dist.io.safetensors_file import SafetensorsReader, read_safetensors_header
from tests.helpers.published_folders import compressed_float_format, mxfp4_parts, mxfp4_values, publish_mxfp4_folder
from tests.helpers.published_weights import STEM, check_weight, find_in
from tests.helpers.tiny_models import make_tokenizer

GPT_OSS = {"quant_method": "mxfp4"}
NAME = "model.layers.0.mlp.experts.down_proj"


def make_gpt_oss(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=320,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    transformers.GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_values_of_codes():
    assert list(FP4_VALUES) == VALUES_OF_TRANSFORMERS
    assert torch.tensor(FP4_VALUES).signbit().equal(torch.tensor(VALUES_OF_TRANSFORMERS).signbit())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_all_codes_with_all_exponents(dtype):
    """Subnormal numbers and overflows included."""
    blocks = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(256, 16, 16)
    exponents = torch.arange(256, dtype=torch.uint8).unsqueeze(1).repeat(1, 16)
    expected = convert_moe_packed_tensors(blocks[None], exponents[None], dtype=getattr(torch, dtype))[0].t()
    actual = Mxfp4Layout(shape=(256, 512), dtype=dtype, code_shape=(256, 16, 16)).decode([blocks, exponents])
    assert torch.equal(actual, expected)
    assert torch.equal(actual.signbit(), expected.signbit())


def test_bytes_that_are_not_read_four_codes_at_a_time():
    codes = torch.arange(255, dtype=torch.uint8)
    values = torch.tensor(FP4_VALUES)
    expected = torch.stack([values[(codes & 15).int()], values[(codes >> 4).int()]], 1).view(-1)
    assert torch.equal(fp4_values(codes).float(), expected)
    assert torch.equal(fp4_values(codes.view(15, 17).t()).float(), expected.view(15, 17, 2).transpose(0, 1).reshape(-1))


@pytest.mark.parametrize("shape", [(40, 64), (1, 32), (3, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compressed_tensors(dtype, shape):
    made = compressed_float_format("mxfp4-pack-quantized")
    parts = made.quantize(torch.randn(shape))
    check_weight(parts, find_published_weights, made.config, made.dequantize(parts).to(dtype))
    assert torch.equal(made.dequantize(parts), mxfp4_values(parts[".weight_packed"], parts[".weight_scale"]))


def test_as_transformers_loads_gpt_oss(tmp_path):
    values = publish_mxfp4_folder(make_gpt_oss(tmp_path / "source"), tmp_path / "mxfp4")
    config = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mxfp4", quantization_config=config)
    entries = read_safetensors_header(tmp_path / "mxfp4" / "model.safetensors")
    found = find_published_weights(entries, GPT_OSS)
    assert found.tensors == {f"{name}{end}" for name in values for end in ("_blocks", "_scales")}
    assert found.weights.keys() == {f"{name}.{expert}.weight" for name in values for expert in range(4)}
    with SafetensorsReader() as reader:
        for name, stacked in values.items():
            assert torch.equal(model.get_parameter(name), stacked)
            for expert, expected in enumerate(stacked):
                weight = found.weights[f"{name}.{expert}.weight"]
                vector = torch.empty(weight.layout.total_bytes, dtype=torch.uint8)
                weight.read_range(reader, vector, 0)
                assert torch.equal(weight.layout.dequantize(vector, torch.bfloat16), expected.t())
                for first, stop in ((0, 1), (5, 17)):
                    data = torch.empty(weight.rows_nbytes(first, stop), dtype=torch.uint8)
                    weight.read_rows(reader, data, first, stop)
                    assert torch.equal(weight.decode_rows(data, first, stop), expected.t()[first:stop])


def test_what_transformers_saves_after_dequantizing_is_refused(tmp_path):
    """It has bf16 under the names of blocks, and transformers itself cannot load it."""
    publish_mxfp4_folder(make_gpt_oss(tmp_path / "source"), tmp_path / "mxfp4")
    config = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mxfp4", quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    entries = read_safetensors_header(tmp_path / "saved" / "model.safetensors")
    with pytest.raises(UserError, match="down_proj_blocks is not in MXFP4; transformers saves a dequantized model so"):
        find_published_weights(entries, GPT_OSS)


BLOCKS, SCALES = torch.zeros(2, 8, 2, 16, dtype=torch.uint8), torch.zeros(2, 8, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        (BLOCKS, None, r"down_proj_blocks is there, but .*down_proj_scales is missing; get the folder anew"),
        (None, SCALES, r"down_proj_scales is there, but .*down_proj_blocks is missing; get the folder anew"),
        (BLOCKS, SCALES[:, :, :1], r"down_proj_scales is uint8\[2, 8, 1\] instead of uint8\[2, 8, 2\]; get"),
        (BLOCKS, SCALES.float(), r"down_proj_scales is float32\[2, 8, 2\] instead of uint8\[2, 8, 2\]; get"),
        (BLOCKS[:, :, :, :8], SCALES, r"down_proj_blocks is uint8\[2, 8, 2, 8\] instead of uint8\[2, 8, 2, 16\]; get"),
        (BLOCKS.flatten(2), SCALES, r"has shape \[2, 8, 32\], not \[experts, rows, groups, 16\]; get the folder anew"),
        (BLOCKS.view(torch.int8), SCALES, r"down_proj_blocks is int8\[2, 8, 2, 16\] instead of uint8"),
    ],
)
def test_damaged_weights_are_refused(blocks, scales, message):
    given = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}
    tensors = {name: tensor.contiguous() for name, tensor in given.items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        find_in(tensors, find_mxfp4_weights, GPT_OSS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({".weight_scale": torch.zeros(4, 1, dtype=torch.uint8)}, r"weight_scale is uint8\[4, 1\] instead of uint8\[4"),
        ({".weight_scale": torch.zeros(4, 2, dtype=torch.int8)}, r"weight_scale is int8\[4, 2\] instead of uint8\[4"),
        ({".weight_packed": torch.zeros(4, 36, dtype=torch.uint8)}, r"weight_packed has 72 columns in groups of 32"),
        ({".weight_packed": torch.zeros(4, 32, dtype=torch.int32)}, r"'mxfp4-pack-quantized' as int32, which is not"),
        (
            {".weight_zero_point": torch.zeros(4, 2)},
            r"'mxfp4-pack-quantized' with a zero point, which is not supported",
        ),
    ],
)
def test_damaged_weights_of_compressed_tensors_are_refused(changes, message):
    made = compressed_float_format("mxfp4-pack-quantized")
    codes, exponents = mxfp4_parts(torch.randn(4, 64))
    parts = {".weight_packed": codes, ".weight_scale": exponents} | changes
    with pytest.raises(UserError, match=message):
        find_in({STEM + suffix: part for suffix, part in parts.items()}, find_published_weights, made.config)
