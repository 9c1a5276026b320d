"""The kernels that update the slices of a page, and the conversion of states from 8 bit to 32 and back."""

from __future__ import annotations

from functools import cache

import torch

from qlora_dist.compat.bitsandbytes import functional as bnb
from qlora_dist.compat.torch import fused_adamw_
from qlora_dist.config.sections import OptimConfig
from qlora_dist.optim.optimizer_state import STATE_NAMES
from qlora_dist.optim.state_pages import STATE_BLOCK_SIZE


@cache
def state_code_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of `exp_avg`, which is signed, and of `exp_avg_sq`: fp32[256] each (Dettmers et al. 2022)."""
    signed, unsigned = (bnb.create_dynamic_map(signed=signed).to(device) for signed in (True, False))
    return signed, unsigned


def fused_adamw(
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    config: OptimConfig,
    lr: float,
    step: int,
) -> None:
    """Update fp32[n] tensors in place with torch's fused AdamW. `step` counts this update too."""
    if not parameters:
        return
    count = torch.full((), float(step), device=parameters[0].device)
    fused_adamw_(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        [count] * len(parameters),
        lr=lr,
        beta1=config.beta1,
        beta2=config.beta2,
        weight_decay=config.weight_decay,
        eps=config.eps,
        amsgrad=False,
        maximize=False,
    )


def bnb_adamw_32bit(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    config: OptimConfig,
    lr: float,
    step: int,
) -> None:
    """Update fp32[n] tensors in place with bitsandbytes' AdamW, which takes states in CUDA's managed memory."""
    bnb.optimizer_update_32bit(
        "adam",
        gradient,
        parameter,
        exp_avg,
        config.beta1,
        config.eps,
        step,
        lr,
        state2=exp_avg_sq,
        beta2=config.beta2,
        weight_decay=config.weight_decay,
    )


def bnb_adamw_8bit(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: tuple[torch.Tensor, torch.Tensor],
    exp_avg_sq: tuple[torch.Tensor, torch.Tensor],
    config: OptimConfig,
    lr: float,
    step: int,
) -> None:
    """Update a tensor in place with bitsandbytes' blockwise AdamW.

    Parameter and gradient are fp32[n]. A state is codes uint8[n] and absmax fp32[ceil(n / STATE_BLOCK_SIZE)].
    """
    signed, unsigned = state_code_tables(parameter.device)
    bnb.optimizer_update_8bit_blockwise(
        "adam",
        gradient,
        parameter,
        exp_avg[0],
        exp_avg_sq[0],
        config.beta1,
        config.beta2,
        0.0,
        0.0,
        config.eps,
        step,
        lr,
        signed,
        unsigned,
        exp_avg[1],
        exp_avg_sq[1],
        weight_decay=config.weight_decay,
    )


def state_to_fp32(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dequantize the 8-bit states (`STATE_NAMES`) among a shard's tensors. The others are returned unchanged."""
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith(".absmax")}
    for name in STATE_NAMES:
        if f"{name}.absmax" in tensors:
            codes, absmax = tensors[name].view(-1), tensors[f"{name}.absmax"]
            table = _code_table(name, codes.device)
            result[name] = torch.ops.bitsandbytes.dequantize_blockwise(
                codes, absmax, table, STATE_BLOCK_SIZE, torch.float32
            )
    return result


def state_from_fp32(state: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """Return a shard's fp32 state in `bits` bits, rounded as the update does."""
    if bits == 32:
        return state
    result = {}
    for name, values in state.items():
        result[name], result[f"{name}.absmax"] = torch.ops.bitsandbytes.quantize_blockwise(
            values.view(-1), _code_table(name, values.device), STATE_BLOCK_SIZE
        )
    return result


def _code_table(name: str, device: torch.device) -> torch.Tensor:
    return state_code_tables(device)[STATE_NAMES.index(name)]
