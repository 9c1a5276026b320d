"""Weights and tiny folders in integer formats as their makers publish them, and values from independent code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import safetensors.torch
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

Tensors = dict[str, torch.Tensor]
"""Tensors of one weight, by the end of their names, such as `.weight_packed`."""

GROUP = 16
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Row of the weight, within 8 rows, that each 4 bits of a word belong to."""


class IntegerFormat(NamedTuple):
    """A published format: how to make it of a weight [out, in], its values by independent code, and its config."""

    quantize: Callable[[torch.Tensor], Tensors]
    dequantize: Callable[[Tensors], torch.Tensor]
    config: dict[str, Any]


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack each row of integers into one stream of bits, int[rows, n] -> int32[rows, ceil(n * bits / 32)]."""
    stream = ((codes.long().unsqueeze(2) >> torch.arange(bits)) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32)).unflatten(1, (-1, 32))
    words = (stream << torch.arange(32)).sum(2)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def unpack_bits(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return int64[rows, count], the inverse of `pack_bits`."""
    stream = ((words.long().unsqueeze(2) >> torch.arange(32)) & 1).flatten(1)[:, : count * bits]
    return (stream.unflatten(1, (count, bits)) << torch.arange(bits)).sum(2)


def group_codes(
    weight: torch.Tensor, bits: int, group_index: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize a weight [out, in] asymmetrically: codes [out, in], scales [out, groups], zero points [out, groups]."""
    groups = int(group_index.max()) + 1
    lows, highs = (torch.stack([reduce(weight[:, group_index == g].float(), 1) for g in range(groups)], 1)
                   for reduce in (torch.amin, torch.amax))  # fmt: skip
    largest = 2**bits - 1
    scales = ((highs - lows) / largest).clamp(min=1e-4).to(dtype)
    zeros = (-lows / scales.float()).round().clamp(0, largest).long()
    by_column = scales.float()[:, group_index], zeros[:, group_index]
    codes = (weight.float() / by_column[0] + by_column[1]).round().clamp(0, largest).long()
    return codes, scales, zeros


def compressed_format(
    *,
    bits: int = 4,
    strategy: str = "group",
    symmetric: bool = True,
    name: str = "pack-quantized",
    dtype: torch.dtype = torch.bfloat16,
    group_size: int = GROUP,
) -> IntegerFormat:
    """Return a format of compressed-tensors, made and read by its own compressors."""
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    if strategy == "group":
        weights["group_size"] = group_size
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if name == "int-quantized":
        group["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    scheme = QuantizationScheme(**group)
    compressor = BaseCompressor.get_value_from_registry(name)

    def quantize(weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        shape = {"group": (rows, columns // group_size), "channel": (rows, 1), "tensor": (1,)}[strategy]
        ranges = weight.float().view(*(shape if len(shape) == 2 else (1, 1)), -1)
        highest = 2 ** (bits - 1)
        if symmetric:
            scale = ranges.abs().amax(2) / (highest - 0.5)
            state: Tensors = {}
        else:
            low, high = ranges.amin(2), ranges.amax(2)
            scale = (high - low) / (2 * highest - 1)
            zero = (-highest - low / scale).round().clamp(-highest, highest - 1)
            state = {"weight_zero_point": zero.to(torch.int8).view(shape)}
        state |= {"weight": weight, "weight_scale": scale.to(dtype).view(shape)}
        return {f".{key}": value.contiguous() for key, value in compressor.compress(state, scheme).items()}

    def dequantize(tensors: Tensors) -> torch.Tensor:
        state = {key.removeprefix("."): value for key, value in tensors.items()}
        return compressor.decompress(state, scheme)["weight"]

    config = {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    return IntegerFormat(quantize, dequantize, config)


def compressed_reordered(*, is_reordered: bool = True) -> IntegerFormat:
    """Return `pack-quantized` with `actorder: group`, which releases of compressed-tensors before 0.20 wrote."""
    plain = compressed_format(bits=4)

    def quantize(weight: torch.Tensor) -> Tensors:
        columns = weight.shape[1]
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
        if not is_reordered:
            return plain.quantize(weight) | {".weight_g_idx": torch.full((columns,), -1, dtype=torch.int32)}
        groups = torch.empty(columns, dtype=torch.int32)
        groups[order] = torch.arange(columns, dtype=torch.int32) // GROUP
        tensors = plain.quantize(weight[:, order].contiguous())
        # the scales belong to the sorted columns, whereas the codes are stored in the weight's own order
        codes = unpack_bits(tensors[".weight_packed"], 4, columns)
        packed = pack_bits(codes[:, order.argsort()], 4)
        return tensors | {".weight_packed": packed, ".weight_g_idx": groups}

    def dequantize(tensors: Tensors) -> torch.Tensor:
        if not is_reordered:
            return plain.dequantize({key: value for key, value in tensors.items() if key != ".weight_g_idx"})
        index = tensors[".weight_g_idx"]
        order = index.argsort(stable=True)
        codes = unpack_bits(tensors[".weight_packed"], 4, len(index))
        in_order = plain.dequantize(tensors | {".weight_packed": pack_bits(codes[:, order], 4)})
        return in_order[:, order.argsort()]

    weights = plain.config["config_groups"]["group_0"]["weights"] | {"actorder": "group"}
    group = plain.config["config_groups"]["group_0"] | {"weights": weights}
    return IntegerFormat(quantize, dequantize, plain.config | {"config_groups": {"group_0": group}})


def gptq_format(
    bits: int = 4,
    *,
    version: str = "gptq",
    desc_act: bool = False,
    has_index: bool = True,
    dtype: torch.dtype = torch.float16,
) -> IntegerFormat:
    """Return GPTQ in groups of GROUP columns, packed by AutoGPTQ's rules."""
    stored_minus = 1 if version == "gptq" else 0

    def quantize(weight: torch.Tensor) -> Tensors:
        columns = weight.shape[1]
        index = torch.arange(columns) // GROUP
        if desc_act:
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
        codes, scales, zeros = group_codes(weight, bits, index, dtype)
        tensors = {
            ".qweight": pack_bits(codes, bits).t().contiguous(),
            ".qzeros": pack_bits((zeros.t() - stored_minus) % 2**bits, bits),
            ".scales": scales.t().contiguous(),
        }
        return tensors | ({".g_idx": index.to(torch.int32)} if has_index else {})

    def dequantize(tensors: Tensors) -> torch.Tensor:
        scales = tensors[".scales"]
        rows = scales.shape[1]
        columns = tensors[".qweight"].shape[0] * 32 // bits
        index = tensors.get(".g_idx", torch.arange(columns) // GROUP)
        codes = unpack_bits(tensors[".qweight"].t(), bits, len(index))
        zeros = (unpack_bits(tensors[".qzeros"], bits, rows) + stored_minus) % 2**bits
        return torch.stack(
            [(codes[:, i] - zeros[group]).to(scales.dtype) * scales[group] for i, group in enumerate(index)], 1
        )

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": desc_act,
        "sym": False,
        "checkpoint_format": version,
    }
    return IntegerFormat(quantize, dequantize, config)


def awq_format(dtype: torch.dtype = torch.float16) -> IntegerFormat:
    """Return AWQ in the layout `gemm` in groups of GROUP columns, packed by AutoAWQ's rules."""

    def pack(rows_last: torch.Tensor) -> torch.Tensor:
        return pack_bits(rows_last.unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1), 4)

    def unpack(words: torch.Tensor) -> torch.Tensor:
        stored = unpack_bits(words, 4, 8 * words.shape[1]).unflatten(1, (-1, 8))
        integers = torch.empty_like(stored)
        for place, row in enumerate(AWQ_ORDER):
            integers[:, :, row] = stored[:, :, place]
        return integers.flatten(1)

    def quantize(weight: torch.Tensor) -> Tensors:
        codes, scales, zeros = group_codes(weight, 4, torch.arange(weight.shape[1]) // GROUP, dtype)
        return {".qweight": pack(codes.t()), ".qzeros": pack(zeros.t()), ".scales": scales.t().contiguous()}

    def dequantize(tensors: Tensors) -> torch.Tensor:
        codes, zeros, scales = unpack(tensors[".qweight"]), unpack(tensors[".qzeros"]), tensors[".scales"]
        rows = [(codes[i] - zeros[i // GROUP]).to(scales.dtype) * scales[i // GROUP] for i in range(len(codes))]
        return torch.stack(rows, 1)

    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return IntegerFormat(quantize, dequantize, config)


def bnb_int8_format() -> IntegerFormat:
    """Return 8 bit of bitsandbytes, made and read by bitsandbytes."""

    def quantize(weight: torch.Tensor) -> Tensors:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
        return {".weight": codes, ".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}

    def dequantize(tensors: Tensors) -> torch.Tensor:
        return bnb.functional.int8_vectorwise_dequant(tensors[".weight"], tensors[".SCB"])

    return IntegerFormat(quantize, dequantize, {"quant_method": "bitsandbytes", "load_in_8bit": True})


INTEGER_FORMATS: dict[str, Callable[[], IntegerFormat]] = {
    "int4": compressed_format,
    "int4-asymmetric": lambda: compressed_format(symmetric=False),
    "int8-channel": lambda: compressed_format(bits=8, strategy="channel"),
    "w8a8": lambda: compressed_format(bits=8, strategy="channel", name="int-quantized"),
    "int4-reordered": compressed_reordered,
    "gptq": gptq_format,
    "gptq-desc-act": lambda: gptq_format(desc_act=True),
    "gptq-8": lambda: gptq_format(8, version="gptq_v2"),
    "awq": awq_format,
    "bnb-int8": bnb_int8_format,
}
"""Formats by name, for tests of whole folders."""


def publish_folder(source: Path, out: Path, name: str, part: str = "", **changes: Any) -> Mapping[str, torch.Tensor]:
    """Write a 16-bit folder in a format: linear layers of the decoder layers with `part` in their names are quantized.

    `changes` are entries of config.json that differ from those in `source`.

    Returns:
        The values of the quantized weights, by the names that they have in `source`.
    """
    made = INTEGER_FORMATS[name]()
    tensors, values = {}, {}
    for key, weight in safetensors.torch.load_file(source / "model.safetensors").items():
        if "_proj" not in key or weight.ndim != 2 or part not in key:
            tensors[key] = weight
            continue
        parts = made.quantize(weight)
        values[key] = made.dequantize(parts).to(weight.dtype)  # transformers rounds to the model's type
        tensors |= {key.removesuffix(".weight") + suffix: part for suffix, part in parts.items()}
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    safetensors.torch.save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": made.config} | changes))
    return values


def set_values(source: Path, values: Mapping[str, torch.Tensor]) -> Path:
    """Give weights of a 16-bit folder other values, such as those that `publish_folder` returns."""
    path = source / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path) | dict(values), path, {"format": "pt"})
    return source


KIMI_K2 = {
    "model_type": "kimi_k2",
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
}
"""Entries of Kimi-K2's config.json that differ from DeepSeek-V3's."""
