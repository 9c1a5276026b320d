"""Folders of any size in FP8 and MXFP4, in the layout in which their makers publish them, written tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from synthetic import begin_folder, llama

_POOL = 2**26  # bytes of random codes, which are repeated because drawing takes long
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def write_fp8(folder: Path, layers: int) -> None:
    """Write Llama-3.1-8B's layers in FP8 with blocks of 128 x 128 and normally distributed weights."""
    config, shapes, quantized = llama(layers)
    scales = {name: (-(-shapes[name][0] // 128), -(-shapes[name][1] // 128)) for name in quantized}
    specs = [(f"{name}_scale_inv", torch.float32, shape) for name, shape in scales.items()]
    specs += [
        (name, torch.float8_e4m3fn if name in quantized else torch.bfloat16, shape) for name, shape in shapes.items()
    ]
    writer = begin_folder(folder, config, specs, {"quantization_config": _FP8})
    pool = torch.empty(_POOL, dtype=torch.bfloat16).normal_(std=64).to(torch.float8_e4m3fn).view(torch.uint8)
    for index, (name, shape) in enumerate(shapes.items()):
        if name in quantized:
            writer.write(name, pool.roll(index * 4097)[: torch.Size(shape).numel()])
            writer.write(f"{name}_scale_inv", torch.full(scales[name], 0.02 / 64))
        else:
            writer.write(name, torch.ones(shape, dtype=torch.bfloat16))
    writer.close()


def write_mxfp4(folder: Path, layers: int) -> None:
    """Write gpt-oss-20b's layers, with their experts in MXFP4 and a small vocabulary."""
    config = transformers.GptOssConfig(num_hidden_layers=layers, num_local_experts=32, vocab_size=1024)
    config.architectures = ["GptOssForCausalLM"]
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config)
    specs: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:  # [experts, in, out] in the class
            experts, columns, rows = parameter.shape
            specs.append((f"{name}_blocks", torch.uint8, (experts, rows, columns // 32, 16)))
            specs.append((f"{name}_scales", torch.uint8, (experts, rows, columns // 32)))
        else:
            specs.append((name, torch.bfloat16, tuple(parameter.shape)))
    quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    writer = begin_folder(folder, config, specs, {"quantization_config": quantization_config})
    pool = torch.randint(0, 256, (_POOL,), dtype=torch.uint8)
    for name, dtype, shape in specs:
        if name.endswith("_blocks"):
            for start in range(0, torch.Size(shape).numel(), _POOL):
                writer.write(name, pool[: torch.Size(shape).numel() - start], start)
        elif name.endswith("_scales"):
            writer.write(name, torch.full(shape, 120, dtype=torch.uint8))
        else:
            writer.write(name, torch.full(shape, 0.02, dtype=dtype))
    writer.close()
