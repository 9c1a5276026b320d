"""If this fails, weights in FP8 get other values than transformers or compressed-tensors gives them."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from qlora_dist.errors import UserError
from qlora_dist.formats.find_published import find_published_weights
from qlora_dist.formats.fp8 import Fp8Layout, find_fp8_weights
from qlora_dist.io.safetensors_file import SafetensorsReader, read_safetensors_header
from tests.helpers.published_folders import (
    FloatFormat,
    compressed_float_format,
    fbgemm_format,
    fp4_expert_format,
    fp8_format,
    fp8_partial_format,
    modelopt_format,
    publish_float_folder,
)
from tests.helpers.published_weights import STEM, check_weight, find_in, saved_tensors
from tests.helpers.tiny_models import make_model


def make_weight(rows: int = 48, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)


def check(made: FloatFormat, rows: int = 48, columns: int = 64) -> None:
    parts = made.quantize(make_weight(rows, columns))
    check_weight(parts, find_published_weights, made.config, made.dequantize(parts))


@pytest.mark.parametrize("block", [(16, 16), (48, 64), (1, 32), None])
@pytest.mark.parametrize(
    "scale_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8]
)
@pytest.mark.parametrize("code_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_as_transformers(code_dtype, scale_dtype, block):
    check(fp8_format(block, code_dtype=code_dtype, scale_dtype=scale_dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("code_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_all_codes(code_dtype, dtype):
    """NaN, infinities, subnormal numbers and overflows included."""
    codes = torch.arange(256, dtype=torch.uint8).view(code_dtype).view(16, 16)
    layout = Fp8Layout(shape=(16, 16), dtype=dtype, code_dtype=code_dtype, scale_shape=(2, 2), block=(8, 8))
    scales = torch.tensor([[1e-6, 3.0], [1e38, 1e-38]])
    expected = Fp8Dequantize(None).convert({"weight": codes, "weight_scale_inv": scales})["weight"]
    actual = layout.decode([codes, scales])
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.to(actual.dtype).nan_to_num())
    assert torch.equal(actual.nan_to_num().signbit(), expected.nan_to_num().signbit())


@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (176, 64), (130, 260), (200, 8), (1, 1), (129, 3), (1, 129)])
def test_blocks_that_end_early(rows, columns):
    check(fp8_partial_format(), rows, columns)


def test_a_block_is_what_the_configuration_says_even_if_the_scales_divide_the_weight_otherwise():
    """With 192 rows and 2 rows of scales, `Fp8Dequantize` takes blocks of 96 rows, DeepSeek's kernels 128 and 64."""
    check(fp8_partial_format(), 192, 128)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", [".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight"])
def test_names_of_scales_and_shapes_of_one_scale(name, shape):
    check(fp8_format(None, scale_name=name, scalar_shape=shape))


def test_rows():
    check(fbgemm_format())
    check(fbgemm_format(), 7, 5)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_compressed_tensors(strategy, scale_dtype):
    check(compressed_float_format(strategy=strategy, scale_dtype=scale_dtype))
    check(compressed_float_format("naive-quantized", strategy, scale_dtype=scale_dtype))


def test_blocks_of_compressed_tensors_that_end_early():
    check(compressed_float_format(strategy="block", block=(128, 128)), 200, 136)


def test_compressed_tensors_rounds_to_the_type_of_the_scales_before_the_type_of_the_model():
    made = compressed_float_format(scale_dtype=torch.bfloat16)
    parts = made.quantize(make_weight())
    expected = made.dequantize(parts)
    assert expected.dtype == torch.bfloat16
    check_weight(parts, find_published_weights, made.config, expected.float())
    assert not torch.equal(parts[".weight"].float() * parts[".weight_scale"].float(), expected.float())


def test_mxfp8():
    check(compressed_float_format("mxfp8-quantized"))
    made = fp8_format((1, 32), scale_dtype=torch.uint8)
    check(made._replace(config={"quant_method": "mxfp8"}))


def test_modelopt():
    check(modelopt_format("FP8"))


def test_fp4_experts():
    check(fp4_expert_format())


@pytest.mark.parametrize("made", [fp8_format(), fp8_format(None), fp4_expert_format()])
def test_stacked_experts(made):
    """`save_pretrained` of a model in FP8 writes stacked experts, without `.weight` in their names."""
    experts = [made.quantize(make_weight(32 + 16 * index, 64)[:32]) for index in range(3)]
    codes, scales = (torch.stack([expert[name] for expert in experts]) for name in experts[0])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    inputs = {f"{name}_activation_scale": torch.ones(3)}
    with saved_tensors(inputs | {name: codes, f"{name}_scale_inv": scales}) as entries, SafetensorsReader() as reader:
        found = find_published_weights(entries, made.config)
        assert found.tensors == entries.keys()
        assert list(found.weights) == [f"{name}.{expert}.weight" for expert in range(3)]
        assert len({weight.layout for weight in found.weights.values()}) == 1
        for weight, parts in zip(found.weights.values(), experts, strict=True):
            data = torch.empty(weight.rows_nbytes(0, 32), dtype=torch.uint8)
            weight.read_rows(reader, data, 0, 32)
            assert torch.equal(weight.decode_rows(data, 0, 32), made.dequantize(parts).bfloat16())


def test_two_rows_of_scales_for_a_small_gate_up_proj():
    """`FP8Experts` of transformers makes them, so that gate and up have scales of their own."""
    codes = make_weight(32, 64).view(1, 32, 64).to(torch.float8_e4m3fn)
    scales = torch.tensor([[[0.5], [2.0]]])
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with saved_tensors({"a.gate_up_proj": codes, "a.gate_up_proj_scale_inv": scales}) as entries:
        layout = find_published_weights(entries, config).weights["a.gate_up_proj.0.weight"].layout
    expected = Fp8Dequantize(None).convert({"weight": codes, "weight_scale_inv": scales})["weight"]
    assert torch.equal(layout.decode([codes[0], scales[0]]), expected[0].bfloat16())


@pytest.mark.parametrize("name", ["fp8", "fp8-tensor", "fp8-ue8m0"])
def test_as_transformers_loads_a_folder(tmp_path, name):
    values = publish_float_folder(make_model(tmp_path / "source"), tmp_path / "fp8", name)
    config = transformers.FineGrainedFP8Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=config)
    assert len(values) == 21
    for key, value in values.items():
        assert torch.equal(value.bfloat16(), model.get_parameter(key))


def test_scales_of_inputs_belong_to_the_format():
    made = fp8_format()
    inputs = (".input_scale", ".activation_scale", ".qscale_act", ".k_scale", ".v_scale")
    parts = made.quantize(make_weight())
    with_inputs = parts | {name: torch.ones(1) for name in inputs}
    check_weight(with_inputs, find_published_weights, made.config, made.dequantize(parts).bfloat16())


FP8 = torch.zeros(48, 64).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({".weight_scale_inv": None}, r"weight is there, but .*weight_scale_inv is missing; get the folder anew"),
        ({".weight": None}, r"weight_scale_inv is there, but .*\.weight is missing; get the folder anew"),
        ({".weight": make_weight()}, r"weight_scale_inv is there, but .*\.weight is bfloat16\[48, 64\]; get"),
        ({".weight_scale_inv": torch.ones(4, 3)}, r"\[48, 64\], which scales of shape \[4, 3\] do not divide into blo"),
        ({".weight_scale_inv": torch.ones(2)}, r"which scales of shape \[2\] do not divide into blocks of \[16, 16\]"),
        ({".weight_scale_inv": torch.ones(0, 3)}, r"scales of shape \[0, 3\] do not divide into blocks of \[16, 16\]"),
        ({".weight_scale_inv": torch.ones(3, 4, dtype=torch.int32)}, r"is int32\[3, 4\], which is no type of scales"),
        ({".weight": FP8.flatten()}, r"and its scales have shapes \[3072\] and \[3, 4\], which fit no matrices; get"),
        ({".weight": FP8.view(2, 24, 64)}, r"have shapes \[2, 24, 64\] and \[3, 4\], which fit no matrices; get"),
    ],
)
def test_damaged_weights_are_refused(changes, message):
    made = fp8_format()
    parts = made.quantize(make_weight()) | changes
    tensors = {STEM + suffix: part for suffix, part in parts.items() if part is not None}
    with pytest.raises(UserError, match=message):
        find_in(tensors, find_fp8_weights, made.config)


def test_scales_that_divide_nothing_evenly_are_refused_without_a_block():
    config = {"quant_method": "fp8", "weight_block_size": None}
    with pytest.raises(UserError, match=r"scales of shape \[5, 4\] do not divide into equal blocks; get"):
        find_in({"a.weight": FP8, "a.weight_scale_inv": torch.ones(5, 4)}, find_fp8_weights, config)


def test_stacked_experts_of_fbgemm_are_refused():
    tensors = {"a.gate_up_proj": FP8.view(2, 24, 64), "a.gate_up_proj_scale": torch.ones(2, 1, 64)}
    with pytest.raises(UserError, match="holds several experts in the layout of fbgemm, which is not supported; give"):
        find_in(tensors, find_fp8_weights, fbgemm_format().config)


def test_a_folder_has_the_values_of_its_weights(tmp_path):
    values = publish_float_folder(make_model(tmp_path / "source"), tmp_path / "fp8", "fp8-partial")
    entries = read_safetensors_header(tmp_path / "fp8" / "model.safetensors")
    found = find_published_weights(entries, fp8_partial_format().config)
    assert found.weights.keys() == values.keys()
    assert not {name for name in entries if name.endswith("_scale_inv")} - found.tensors
