"""Weights and tiny folders in floating-point formats as their makers publish them, and values from independent code.

The values come from transformers or compressed-tensors. DeepSeek's formula gives them for blocks that end early, and
ModelOpt's formula for its files, because neither library reads those.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]
"""Tensors of one weight, by the end of their names, such as `.weight_scale_inv`."""

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


class FloatFormat(NamedTuple):
    """A published format: how to make it of a weight [out, in], its values by independent code, and its config."""

    quantize: Callable[[torch.Tensor], Tensors]
    dequantize: Callable[[Tensors], torch.Tensor]
    config: dict[str, Any]


def block_maxima(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return fp32[block rows, block columns], the largest absolute value of each block."""
    (rows, columns), (height, width) = weight.shape, block
    padded = torch.nn.functional.pad(weight.float().abs(), (0, -columns % width, 0, -rows % height))
    return padded.view(-(-rows // height), height, -(-columns // width), width).amax((1, 3)).clamp(min=1e-6)


def spread(scales: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """Return the scale of each weight of a matrix of this shape."""
    rows = scales.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def round_up_to_powers(scales: torch.Tensor) -> torch.Tensor:
    return scales.log2().ceil().exp2()


def fp8_codes(
    weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float8_e4m3fn, *, powers: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight to FP8 codes with a scale for each block, fp32[block rows, block columns]."""
    scales = block_maxima(weight, block) / FP8_MAX[dtype]
    if powers:
        scales = round_up_to_powers(scales)
    return (weight.float() / spread(scales, block, weight.shape)).to(dtype), scales


def fp8_format(
    block: tuple[int, int] | None = (16, 16),
    *,
    code_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    scale_name: str = ".weight_scale_inv",
    scalar_shape: tuple[int, ...] = (),
) -> FloatFormat:
    """Return FP8 as DeepSeek-V3, Qwen3 and MiniMax-M2 publish it. Without blocks one scale is for a whole weight."""

    def quantize(weight: torch.Tensor) -> Tensors:
        codes, scales = fp8_codes(weight, block or weight.shape, code_dtype, powers=scale_dtype.itemsize == 1)
        if scale_dtype == torch.uint8:
            scales = scales.to(torch.float8_e8m0fnu).view(torch.uint8)
        scales = scales.to(scale_dtype) if block else scales.to(scale_dtype).reshape(scalar_shape)
        return {".weight": codes, scale_name: scales}

    def dequantize(tensors: Tensors) -> torch.Tensor:
        given = {"weight": tensors[".weight"], "weight_scale_inv": tensors[scale_name]}
        return Fp8Dequantize(None).convert(given)["weight"]

    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block) if block else None,
    }
    return FloatFormat(quantize, dequantize, config)


def fp8_partial_format(block: tuple[int, int] = (128, 128)) -> FloatFormat:
    """Return FP8 with blocks that the weight may end within, as DeepSeek's `weight_dequant` reads it."""

    def dequantize(tensors: Tensors) -> torch.Tensor:
        codes, scales = tensors[".weight"], tensors[".weight_scale_inv"]
        return (codes.float() * spread(scales, block, codes.shape)).bfloat16()

    return fp8_format(block)._replace(dequantize=dequantize)


def fbgemm_format() -> FloatFormat:
    """Return FP8 with a scale for each row, as Meta publishes Llama-3.1-405B."""

    def quantize(weight: torch.Tensor) -> Tensors:
        codes, scales = fp8_codes(weight, (1, weight.shape[1]))
        return {".weight": codes, ".weight_scale": scales}

    def dequantize(tensors: Tensors) -> torch.Tensor:
        return (tensors[".weight"].float() * tensors[".weight_scale"]).bfloat16()

    return FloatFormat(quantize, dequantize, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0})


def nibbles(weight: torch.Tensor) -> torch.Tensor:
    """Return uint8[rows, columns / 2], the codes of the FP4 values that are nearest to the weights."""
    values = torch.tensor(FP4_VALUES)
    codes = (weight.float().unsqueeze(-1) - values).abs().argmin(-1).to(torch.uint8)
    codes[(codes == 0) & weight.signbit()] = 8  # -0.0
    return codes[:, 0::2] | codes[:, 1::2] << 4


def mxfp4_parts(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight to codes, uint8[out, in / 2], and exponents, uint8[out, in / 32]."""
    exponents = block_maxima(weight, (1, 32)).log2().floor() - 2
    codes = nibbles(weight.float() / spread(exponents.exp2(), (1, 32), weight.shape))
    return codes, (exponents + 127).to(torch.uint8)


def mxfp4_values(codes: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return the values [out, in] by transformers' function."""
    blocks = codes.view(1, *exponents.shape, 16)
    return convert_moe_packed_tensors(blocks, exponents.unsqueeze(0), dtype=dtype)[0].t().contiguous()


def fp4_expert_format() -> FloatFormat:
    """Return FP4 as DeepSeek-V4 publishes its experts: int8 codes, and scales in float8_e8m0fnu named `.scale`."""

    def quantize(weight: torch.Tensor) -> Tensors:
        codes, exponents = mxfp4_parts(weight)
        return {".weight": codes.view(torch.int8), ".scale": exponents.view(torch.float8_e8m0fnu)}

    def dequantize(tensors: Tensors) -> torch.Tensor:
        given = {"weight": tensors[".weight"], "weight_scale_inv": tensors[".scale"]}
        return Fp8Dequantize(None).convert(given)["weight"]

    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
    return FloatFormat(quantize, dequantize, config)


def nvfp4_parts(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize a weight to codes, scales in FP8, and the number that these scales were multiplied by, fp32[1]."""
    whole = (448 * 6 / weight.float().abs().max().clamp(min=1e-6)).view(1)
    scales = (block_maxima(weight, (1, 16)) / 6 * whole).clamp(min=2**-6).to(torch.float8_e4m3fn)
    return nibbles(weight.float() / spread(scales.float() / whole, (1, 16), weight.shape)), scales, whole


def modelopt_format(algorithm: str = "NVFP4") -> FloatFormat:
    """Return NVFP4 or FP8 as NVIDIA's ModelOpt writes it, with scales of inputs."""

    def quantize(weight: torch.Tensor) -> Tensors:
        inputs = {".input_scale": torch.tensor(0.5)}
        if algorithm == "FP8":
            codes, scales = fp8_codes(weight, weight.shape)
            return inputs | {".weight": codes, ".weight_scale": scales.view(())}
        codes, scales, whole = nvfp4_parts(weight)
        return inputs | {".weight": codes, ".weight_scale": scales, ".weight_scale_2": (1 / whole).view(())}

    def dequantize(tensors: Tensors) -> torch.Tensor:
        codes, scales = tensors[".weight"], tensors[".weight_scale"].float()
        if algorithm == "FP8":
            return (codes.float() * scales).bfloat16()
        values = torch.tensor(FP4_VALUES)
        weight = torch.stack([values[(codes & 15).int()], values[(codes >> 4).int()]], -1).view(len(codes), -1)
        return (weight * spread(scales * tensors[".weight_scale_2"], (1, 16), weight.shape)).bfloat16()

    return FloatFormat(quantize, dequantize, {"quant_method": "modelopt", "quant_algo": algorithm})


def compressed_float_format(
    name: str = "float-quantized",
    strategy: str = "channel",
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    block: tuple[int, int] = (32, 16),
) -> FloatFormat:
    """Return a floating-point format of compressed-tensors, read by its own compressors. It skips without them."""
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="needs Python 3.11")
    from compressed_tensors.quantization import QuantizationScheme

    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    if name == "nvfp4-pack-quantized":
        weights |= {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}
    elif name.startswith("mxfp"):
        weights |= {"num_bits": 4 if "mxfp4" in name else 8, "strategy": "group", "group_size": 32}
    elif strategy == "block":
        weights["block_structure"] = list(block)
    group = {"targets": ["Linear"], "weights": weights}
    scheme = QuantizationScheme(**group)
    compressor = compressors.BaseCompressor.get_value_from_registry(name)

    def quantize(weight: torch.Tensor) -> Tensors:
        if name == "nvfp4-pack-quantized":
            codes, scales, whole = nvfp4_parts(weight)
            return {".weight_packed": codes, ".weight_scale": scales, ".weight_global_scale": whole}
        if name == "mxfp4-pack-quantized":
            return dict(zip((".weight_packed", ".weight_scale"), mxfp4_parts(weight), strict=True))
        shapes = {"channel": (1, weight.shape[1]), "tensor": tuple(weight.shape), "block": block}
        codes, scales = fp8_codes(weight, shapes.get(strategy, (1, 32)), powers=name == "mxfp8-quantized")
        if name == "mxfp8-quantized":
            return {".weight": codes, ".weight_scale": scales.to(torch.float8_e8m0fnu).view(torch.uint8)}
        return {
            ".weight": codes,
            ".weight_scale": scales.to(scale_dtype).view(*([1] if strategy == "tensor" else scales.shape)),
        }

    def dequantize(tensors: Tensors) -> torch.Tensor:
        return compressor.decompress({key.removeprefix("."): value for key, value in tensors.items()}, scheme)["weight"]

    config = {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    return FloatFormat(quantize, dequantize, config)


FLOAT_FORMATS: dict[str, Callable[[], FloatFormat]] = {
    "fp8": fp8_format,
    "fp8-tensor": lambda: fp8_format(None),
    "fp8-ue8m0": lambda: fp8_format(scale_dtype=torch.float8_e8m0fnu),
    "fp8-partial": fp8_partial_format,
    "fbgemm": fbgemm_format,
    "fp8-channel": compressed_float_format,
    "fp8-block": lambda: compressed_float_format(strategy="block"),
    "nvfp4": lambda: compressed_float_format("nvfp4-pack-quantized"),
    "modelopt-fp8": lambda: modelopt_format("FP8"),
    "modelopt-nvfp4": modelopt_format,
}
"""Formats by name, for tests of whole folders. All need a number of columns that 16 divides."""


def publish_float_folder(source: Path, out: Path, name: str) -> Mapping[str, torch.Tensor]:
    """Write a 16-bit folder in a format of FLOAT_FORMATS: every linear layer of the decoder layers is quantized.

    Returns:
        The values of the quantized weights, by the names that they have in `source`.
    """
    made = FLOAT_FORMATS[name]()
    tensors, values = {}, {}
    for key, weight in safetensors.torch.load_file(source / "model.safetensors").items():
        if "_proj" not in key or weight.ndim != 2:
            tensors[key] = weight
            continue
        parts = made.quantize(weight)
        values[key] = made.dequantize(parts)
        tensors |= {key.removesuffix(".weight") + suffix: part for suffix, part in parts.items()}
    _write_folder(source, out, tensors, made.config)
    return values


def publish_mxfp4_folder(source: Path, out: Path) -> Mapping[str, torch.Tensor]:
    """Write a 16-bit folder of gpt-oss as OpenAI publishes it: the experts' matrices, [experts, in, out], are in MXFP4.

    The dimensions must be multiples of 32.

    Returns:
        The values of the experts' matrices, [experts, in, out], by the names that they have in `source`.
    """
    tensors, values = {}, {}
    for key, weight in safetensors.torch.load_file(source / "model.safetensors").items():
        if weight.ndim != 3:
            tensors[key] = weight
            continue
        parts = [mxfp4_parts(matrix.t()) for matrix in weight]
        codes, exponents = (torch.stack(part) for part in zip(*parts, strict=True))
        blocks = codes.unflatten(-1, (-1, 16)).contiguous()
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": exponents}
        values[key] = convert_moe_packed_tensors(blocks, exponents)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _write_folder(source, out, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    return values


def _write_folder(source: Path, out: Path, tensors: Tensors, quantization_config: dict[str, Any]) -> None:
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    safetensors.torch.save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))
