"""If this fails, weights in a published format are not found, or tensors of an unknown layout are taken for others."""

from __future__ import annotations

import pytest
import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.find_published import find_published_weights
from qlora_dist.io.safetensors_file import SafetensorsReader, read_safetensors_header
from tests.helpers.published_folders import FLOAT_FORMATS, compressed_float_format, publish_float_folder
from tests.helpers.published_integer_folders import INTEGER_FORMATS
from tests.helpers.published_weights import check_weight, find_in
from tests.helpers.tiny_models import make_model


@pytest.mark.parametrize("name", [*FLOAT_FORMATS, *INTEGER_FORMATS])
def test_each_format_is_found_by_its_configuration(name):
    made = (FLOAT_FORMATS | INTEGER_FORMATS)[name]()
    parts = made.quantize(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
    check_weight(parts, find_published_weights, made.config, made.dequantize(parts).bfloat16())


def test_a_folder_of_several_formats():
    """Kimi-K2 has attention in FP8 beside experts in INT4."""
    fp8, nvfp4 = compressed_float_format(), compressed_float_format("nvfp4-pack-quantized")
    int4 = INTEGER_FORMATS["int4"]()
    targets = {"group_0": ("a.q_proj", fp8), "group_1": ("re:.*experts.*", int4), "group_2": ("a.down_proj", nvfp4)}
    groups, tensors, expected = {}, {"a.norm.weight": torch.ones(2)}, {}
    for (key, (target, made)), stem in zip(targets.items(), ("a.q_proj", "a.experts.0.up", "a.down_proj"), strict=True):
        groups[key] = made.config["config_groups"]["group_0"] | {"targets": [target], "format": made.config["format"]}
        parts = made.quantize(torch.randn(16, 64).bfloat16())
        tensors |= {stem + suffix: part for suffix, part in parts.items()}
        expected[f"{stem}.weight"] = made.dequantize(parts)
    config = fp8.config | {"format": "mixed-precision", "config_groups": groups}
    found = find_in(tensors, find_published_weights, config)
    assert found.weights.keys() == expected.keys()
    assert found.tensors == tensors.keys() - {"a.norm.weight"}


def test_other_tensors_of_a_folder_are_left(tmp_path):
    values = publish_float_folder(make_model(tmp_path / "source"), tmp_path / "fp8", "fp8-channel")
    entries = read_safetensors_header(tmp_path / "fp8" / "model.safetensors")
    found = find_published_weights(entries, FLOAT_FORMATS["fp8-channel"]().config)
    assert found.weights.keys() == values.keys()
    assert found.tensors == {key + end for key in values for end in ("", "_scale")}
    with SafetensorsReader() as reader:
        for key, value in values.items():
            weight = found.weights[key]
            chunks = []
            for first, stop in weight.row_chunks():
                data = torch.empty(weight.rows_nbytes(first, stop), dtype=torch.uint8)
                weight.read_rows(reader, data, first, stop)
                chunks.append(weight.decode_rows(data, first, stop))
            assert torch.equal(torch.cat(chunks), value)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ("fp8", {}, "config.json: quantization_config is no JSON object; get the file anew"),
        *(
            ({"quant_method": "fp8", "weight_block_size": block}, {}, "weight_block_size is not two whole numbers")
            for block in ("16x16", [0, 16], [16], 16)
        ),
        (
            INTEGER_FORMATS["int4"]().config | {"transform_config": [1]},
            {},
            "config.json: quantization_config.transform_config is no JSON object; get the file anew",
        ),
        ({"quant_method": "vptq"}, {}, "is quantized with vptq, which is not supported; give a copy of the model in"),
        ({}, {}, "is quantized with None, which is not supported; give a copy of the model in 16 bit"),
        (
            {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
            {},
            "is quantized by ModelOpt with W4A8_AWQ, which is not supported; give a copy of the model in 16 bit",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            {},
            "quantized with bitsandbytes, but has no weights in 4 or 8 bit of it, which is not supported; give a copy",
        ),
        (
            INTEGER_FORMATS["int4"]().config | {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
            {},
            "after a rotation of its weights, which is not supported; give a copy",
        ),
        (
            INTEGER_FORMATS["int4"]().config,
            {"a.weight_scale": torch.ones(2, 1)},
            "a.weight_scale belongs to a weight in a layout that is not supported; give a copy of the model in 16 bit",
        ),
        (
            INTEGER_FORMATS["int4"]().config,
            {"a.compressed": torch.ones(2), "a.bitmask": torch.ones(2, dtype=torch.uint8)},
            "a.bitmask belongs to a weight in a layout that is not supported; give a copy of the model in 16 bit",
        ),
    ],
)
def test_unknown_formats_are_refused(config, tensors, message):
    with pytest.raises(UserError, match=message):
        find_in({"a.norm.weight": torch.ones(2)} | tensors, find_published_weights, config)
