"""Optimizer states converted from 8 bit to 32 and back."""

from __future__ import annotations

import torch

from qlora_dist.optim.adamw_kernels import dequantize_state, quantize_state
from qlora_dist.optim.optimizer_state import STATE_NAMES


def state_to_fp32(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dequantize the 8-bit states (`STATE_NAMES`) among a shard's tensors. The others are returned unchanged."""
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith(".absmax")}
    for name in STATE_NAMES:
        if f"{name}.absmax" in tensors:
            result[name] = dequantize_state(
                tensors[name].view(-1), tensors[f"{name}.absmax"], signed=name == STATE_NAMES[0]
            )
    return result


def state_from_fp32(state: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """Return a shard's fp32 state in `bits` bits, as `PagedOptimizerState.write` takes it."""
    if bits == 32:
        return state
    result = {}
    for name, values in state.items():
        result[name], result[f"{name}.absmax"] = quantize_state(values.view(-1), signed=name == STATE_NAMES[0])
    return result
