"""The kernels that update the slices of a page."""

from __future__ import annotations

from functools import cache

import torch

from qlora_dist.compat.bitsandbytes import functional as bnb
from qlora_dist.compat.torch import fused_adamw_
from qlora_dist.config.sections import OptimConfig
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
    """Update fp32[n] tensors in place with torch's fused AdamW.

    Args:
        parameters: parts of shards.
        gradients: gradients of these parts.
        exp_avgs: first moments.
        exp_avg_sqs: second moments.
        config: betas, eps and weight decay.
        lr: learning rate.
        step: number of updates, this one included.
    """
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


def quantize_state(values: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize fp32[n] as the update does: codes uint8[n], absmax fp32[ceil(n / STATE_BLOCK_SIZE)]."""
    table = state_code_tables(values.device)[0 if signed else 1]
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values, table, STATE_BLOCK_SIZE)
    return codes, absmax


def dequantize_state(codes: torch.Tensor, absmax: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """Return the fp32[n] values of what `quantize_state` returned."""
    table = state_code_tables(codes.device)[0 if signed else 1]
    values: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        codes, absmax, table, STATE_BLOCK_SIZE, torch.float32
    )
    return values
