"""Helpers of benchmarks: Llama-like folders of any size, written tensor by tensor, and a process's memory."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from qlora_dist.io.safetensors_file import SafetensorsWriter
from qlora_dist.model.quantizable import quantizable_parameters
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quant_state import quant_state_specs, quant_state_tensors

NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["lm_head"],
}


def llama(layers: int, **settings: Any) -> tuple[transformers.LlamaConfig, dict[str, tuple[int, ...]], set[str]]:
    """Return Llama-3.1-8B's configuration with a small vocabulary, its shapes, and the names of weights to quantize.

    Args:
        layers: number of layers.
        settings: values of the configuration, for layers of another size.
    """
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 1024,
            "tie_word_embeddings": False,
        }
        | settings
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return config, shapes, {target.name for target in quantizable_parameters(model)}


def write_nf4(folder: Path, layers: int, **settings: Any) -> int:
    """Write a folder of `qlora-dist quantize` with random codes and scales, and return the bytes of its weights."""
    config, shapes, quantized = llama(layers, **settings)
    layouts = {name: NF4Layout(shape=shapes[name]) for name in quantized}
    specs: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name, shape in shapes.items():
        specs += quant_state_specs(name, layouts[name]) if name in layouts else [(name, torch.bfloat16, shape)]
    writer = begin_folder(folder, config, specs, {"quantization_config": NF4})
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name in layouts:
            packed = torch.frombuffer(bytearray(generator.bytes(layouts[name].total_bytes)), dtype=torch.uint8)
            nested = layouts[name].nested_absmax
            packed[nested] = torch.full(((nested.stop - nested.start) // 4,), 0.01).view(torch.uint8)
            packed[layouts[name].offset] = torch.tensor([0.05]).view(torch.uint8)
            for key, tensor in quant_state_tensors(name, packed, layouts[name]).items():
                writer.write(key, tensor)
        else:
            writer.write(name, torch.ones(shape, dtype=torch.bfloat16))
    writer.close()
    return (folder / "model.safetensors").stat().st_size


def write_bf16(folder: Path, layers: int) -> int:
    """Write a folder in bf16 with normally distributed weights, and return the bytes of its weights."""
    config, shapes, _ = llama(layers)
    writer = begin_folder(folder, config, [(name, torch.bfloat16, shape) for name, shape in shapes.items()], {})
    pool = torch.empty(2**26, dtype=torch.bfloat16).normal_(std=0.02)  # repeated, because drawing takes long
    for index, (name, shape) in enumerate(shapes.items()):
        weight = pool.roll(index * 4097)[: torch.Size(shape).numel()]
        writer.write(name, weight)
    writer.close()
    return (folder / "model.safetensors").stat().st_size


def begin_folder(
    folder: Path, config: transformers.PreTrainedConfig, specs: Any, more: dict[str, Any]
) -> SafetensorsWriter:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"dtype": "bfloat16"} | more))
    return SafetensorsWriter(folder / "model.safetensors", specs)


def drop_from_page_cache(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that the next read comes from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # dirty pages would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident_bytes(field: str = "VmRSS") -> int:
    """Return this process's resident bytes (VmRSS), or their peak (VmHWM).

    Mapped pages of files count, such as those that safetensors maps. Pages read with `read` do not.
    """
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def restart_peak() -> int:
    """Restart VmHWM, and return the resident bytes (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()
