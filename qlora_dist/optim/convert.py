"""Moments from 8 bit to 32 and back."""

from __future__ import annotations

import torch

from qlora_dist.optim.adamw_kernels import dequantize_state, quantize_state
from qlora_dist.optim.optimizer_state import STATE_NAMES


def state_to_fp32(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a shard's tensors those that are moments in 8 bit, by the names of `STATE_NAMES`, become fp32; others stay."""
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith(".absmax")}
    for name in STATE_NAMES:
        if f"{name}.absmax" in tensors:
            result[name] = dequantize_state(tensors[name].view(-1), tensors[f"{name}.absmax"], name == STATE_NAMES[0])
    return result


def state_from_fp32(moments: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """A shard's moments, fp32, as tensors of so many bits: what `Moments.write` takes."""
    if bits == 32:
        return moments
    result = {}
    for name, values in moments.items():
        result[name], result[f"{name}.absmax"] = quantize_state(values.view(-1), name == STATE_NAMES[0])
    return result
