"""A 16-bit folder with the values for which the 4-bit folder stands, by bitsandbytes alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes.functional
import torch
from safetensors.torch import load_file, save_file


def write_dequantized_folder(source: Path, quantized: Path, out: Path) -> None:
    """Copy `source` to `out` in fp32, with each quantized tensor dequantized.

    Names and shapes are as in `source`. Some of its matrices are transposed in 4 bit. The values show which ones,
    because the quantization error is small.
    """
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    packed = _tensors(quantized)
    tensors = {name: _plain_tensor(name, tensor, packed) for name, tensor in _tensors(source).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))


def _plain_tensor(name: str, original: torch.Tensor, packed: dict[str, torch.Tensor]) -> torch.Tensor:
    if not original.is_floating_point():
        return original
    original = original.float()
    experts = [f"{name}.{index}.weight" for index in range(len(original))] if original.dim() == 3 else []
    if experts and experts[0] in packed:
        parts = [_dequantize(packed, key, part) for key, part in zip(experts, original, strict=True)]
        return torch.stack(parts)
    if f"{name}.absmax" in packed:
        return _dequantize(packed, name, original).contiguous()
    assert torch.equal(packed[name].float(), original), name
    return original


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _dequantize(packed: dict[str, torch.Tensor], name: str, original: torch.Tensor) -> torch.Tensor:
    state = {key.removeprefix(f"{name}."): value for key, value in packed.items() if key.startswith(f"{name}.")}
    quant_state = bitsandbytes.functional.QuantState.from_dict(state, torch.device("cpu"))
    # as one row, because the kernel for rows is wrong on some processors if a block spans two of them
    shape, quant_state.shape = quant_state.shape, torch.Size([quant_state.shape.numel()])
    weight = bitsandbytes.functional.dequantize_4bit(packed[name], quant_state).float().view(shape)
    candidates = [candidate for candidate in (weight, weight.T) if candidate.shape == original.shape]
    best = min(candidates, key=lambda candidate: float((candidate - original).norm()))
    assert (best - original).norm() < 0.2 * original.norm(), name
    return best
