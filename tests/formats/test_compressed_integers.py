"""If this fails, integer weights of compressed-tensors get other values than compressed-tensors gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from qlora_dist.errors import UserError
from qlora_dist.formats.compressed_integers import find_compressed_integers
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.io.safetensors_file import SafetensorsReader, read_safetensors_header
from tests.helpers.published_integer_folders import (
    IntegerFormat,
    compressed_format,
    compressed_reordered,
    publish_folder,
)
from tests.helpers.published_weights import STEM, check_weight, find_in
from tests.helpers.tiny_models import make_model


def make_weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)


def check(made: IntegerFormat, rows: int = 20, columns: int = 64) -> None:
    parts = made.quantize(make_weight(rows, columns))
    check_weight(parts, find_compressed_integers, made.config, made.dequantize(parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_types_of_scales(bits, dtype):
    check(compressed_format(bits=bits, dtype=dtype))


def test_values_are_rounded_to_the_type_of_the_model():
    made = compressed_format(dtype=torch.float32)
    parts = made.quantize(make_weight(20, 64))
    check_weight(parts, find_compressed_integers, made.config, made.dequantize(parts).to(torch.bfloat16))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_packed(bits, strategy, symmetric):
    check(compressed_format(bits=bits, strategy=strategy, symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("name", ["int-quantized", "naive-quantized"])
def test_not_packed(name, strategy, symmetric):
    check(compressed_format(bits=8, strategy=strategy, symmetric=symmetric, name=name))


def test_kimi():
    made = compressed_format(group_size=32)
    parts = made.quantize(make_weight(24, 96))
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        ".weight_packed": (torch.int32, (24, 12)),
        ".weight_scale": (torch.bfloat16, (24, 3)),
        ".weight_shape": (torch.int64, (2,)),
    }
    check(made, 24, 96)


@pytest.mark.parametrize("is_reordered", [True, False])
def test_reordered_columns(is_reordered):
    check(compressed_reordered(is_reordered=is_reordered))


def test_rows_and_columns_that_end_within_a_word():
    check(compressed_format(symmetric=False), rows=9)
    check(compressed_format(), rows=1)
    check(compressed_format(bits=3, group_size=5), columns=75)


def test_extreme_codes():
    made = compressed_format(symmetric=False)
    parts = made.quantize(make_weight(16, 64))
    parts[".weight_packed"] = torch.randint(-(2**31), 2**31 - 1, (16, 8)).to(torch.int32)
    parts[".weight_zero_point"] = torch.randint(-(2**31), 2**31 - 1, (2, 4)).to(torch.int32)
    check_weight(parts, find_compressed_integers, made.config, made.dequantize(parts))


def test_each_group_has_its_own_scheme():
    int4, int8 = compressed_format(), compressed_format(bits=8, strategy="channel", name="int-quantized")
    groups = {
        "group_0": int4.config["config_groups"]["group_0"] | {"targets": ["re:.*experts.*"]},
        "group_1": int8.config["config_groups"]["group_0"] | {"format": "int-quantized"},
        "group_2": int8.config["config_groups"]["group_0"] | {"format": "pack-quantized", "targets": ["a.lm_head"]},
        "group_3": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
    }
    packed = compressed_format(bits=8, strategy="channel")
    expected, tensors = {}, {"a.norm.weight": torch.ones(2)}
    for stem, made in (("a.experts.0.up_proj", int4), ("a.q_proj", int8), ("a.lm_head", packed)):
        parts = made.quantize(make_weight(20, 64))
        expected[f"{stem}.weight"] = made.dequantize(parts)
        tensors |= {stem + suffix: part for suffix, part in parts.items()}
    activations = {"a.q_proj.input_scale": torch.ones(1), "a.k_scale": torch.ones(1)}
    found = find_in(tensors | activations, find_compressed_integers, int4.config | {"config_groups": groups})
    assert found.weights.keys() == expected.keys()
    assert found.tensors == (tensors.keys() | activations.keys()) - {"a.norm.weight"}
    assert [weight.layout.bits for weight in found.weights.values()] == [4, 8, 8]


def test_as_transformers_loads_it(tmp_path):
    source = make_model(tmp_path / "source")
    publish_folder(source, tmp_path / "int4", "int4-asymmetric")
    config = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int4", quantization_config=config)
    entries = read_safetensors_header(tmp_path / "int4" / "model.safetensors")
    found = find_compressed_integers(entries, compressed_format(symmetric=False).config, "bfloat16")
    assert len(found.weights) == 21
    for name, weight in found.weights.items():
        assert torch.equal(read_whole(weight).bfloat16(), model.get_parameter(name))


def read_whole(weight: PublishedWeightEntry) -> torch.Tensor:
    vector = torch.empty(weight.layout.total_bytes, dtype=torch.uint8)
    with SafetensorsReader() as reader:
        weight.read_range(reader, vector, 0)
    return weight.layout.dequantize(vector, torch.float32)


def group(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True} | changes
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {".weight_scale": None}, "weight_scale is missing; get the folder anew"),
        ({}, {".weight_scale": torch.ones(20, 4, dtype=torch.int32)}, "scales of this type are not supported; give"),
        ({}, {".weight_scale": torch.ones(20, 3)}, r"weight_packed is int32\[20, 8\] instead of int32\[20, 6\]; get"),
        ({}, {".weight_scale": torch.ones(5, 4)}, r"weight_scale is float32\[5, 4\] instead of float32\[20, 4\]; get"),
        ({}, {".weight_packed": torch.zeros(20, 8, dtype=torch.uint8)}, r"is uint8\[20, 8\] instead of int32"),
        ({}, {".weight_packed": torch.zeros(2, 20, 8, dtype=torch.int32)}, r"shape \[2, 20, 8\], which is no matrix"),
        (group(symmetric=False), {}, "weight_zero_point is missing; get the folder anew"),
        (group(strategy="block", group_size=None), {}, "scales of the strategy 'block', which is not supported for"),
        (group(num_bits=16), {}, "in 16 bit of the format 'pack-quantized', which is not supported; give a copy"),
        ({"format": "marlin-24"}, {}, "in 4 bit of the format 'marlin-24', which is not supported; give a copy"),
        ({"format": "int-quantized"}, {}, "in 4 bit of the format 'int-quantized', which is not supported; give"),
        ({"config_groups": {}}, {}, "config.json: quantization_config.config_groups lists no groups; get the file"),
        ({"config_groups": {"a": {"targets": ["re:("], "weights": {}}}}, {}, "config_groups.a cannot be read"),
        ({"config_groups": {"a": {"targets": ["Linear"]}}}, {}, "quantizes activations only, which is not supported"),
    ],
)
def test_unsupported_weights_are_refused(config, changes, message):
    made = compressed_format()
    parts = {name: part for name, part in (made.quantize(make_weight(20, 64)) | changes).items() if part is not None}
    tensors = {STEM + suffix: part for suffix, part in parts.items()}
    with pytest.raises(UserError, match=message):
        find_in(tensors, find_compressed_integers, made.config | config)


def test_a_module_of_no_group_is_refused():
    schemes = group()["config_groups"] | {"group_1": {"targets": ["re:.*x"], "weights": {"num_bits": 8}}}
    schemes["group_0"]["targets"] = ["re:.*experts.*"]
    made = compressed_format()
    tensors = {STEM + suffix: part for suffix, part in made.quantize(make_weight(20, 64)).items()}
    with pytest.raises(UserError, match=r"down_proj\.weight_packed belongs to no group of quantization_config"):
        find_in(tensors, find_compressed_integers, made.config | {"config_groups": schemes})
