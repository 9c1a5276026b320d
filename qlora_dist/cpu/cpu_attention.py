"""Causal attention of packed sequences on the CPU: torch's flash kernels, with the faster backward of two.

torch 2.13's kernel for bf16 takes about as long in backward for 16 sequences of 128 as for two of 1,024: 68 and 90 ms
(one thread with AMX, nine heads of 64); in fp32, the copies included, 25 and 115. Short sequences are therefore
differentiated in fp32, which is also the more exact.

An operator of torch's library, so that torch.compile takes it as one node: the loop over sequences, whose lengths
differ from batch to batch, is nothing to be traced.
"""

from __future__ import annotations

from typing import Any

import torch

from qlora_dist.compat.torch import flash_attention_cpu, flash_attention_cpu_backward
from qlora_dist.sequence_starts import sequence_slices

_FP32_BACKWARD_LENGTH = 384  # positions: below, backward is faster in fp32


def packed_causal_attention_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention within each sequence.

    Args:
        query: [batch, heads, length, d], on the CPU.
        key: [batch, heads / groups, length, d].
        value: as key.
        starts: of `boundaries`.
        scale: of the scores.

    Returns:
        [batch, length, heads, d].
    """
    output: torch.Tensor = _attention(query, key, value, starts, scale)[0]
    return output


@torch.library.custom_op("qlora_dist::causal_attention", mutates_args=())
def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    output, logsumexp = _outputs(query)
    for rows, first, end in sequence_slices(starts, query.shape[2]):
        q, k, v = (t[rows, :, first:end] for t in (query, key, value))
        part, part_logsumexp = flash_attention_cpu(q, k, v, 0.0, True, scale=scale)
        output[rows, first:end] = part.transpose(1, 2)
        logsumexp[rows, first:end] = part_logsumexp.transpose(1, 2)
    return output, logsumexp


@_attention.register_fake
def _(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(query)


def _outputs(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, size = query.shape
    kept = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(batch, length, heads, size), query.new_empty(batch, length, heads, dtype=kept)


@torch.library.custom_op("qlora_dist::causal_attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = _empty_grad(query), _empty_grad(key), _empty_grad(value)
    for rows, first, end in sequence_slices(starts, query.shape[2]):
        parts = [t[rows, :, first:end] for t in (grad.transpose(1, 2), query, key, value, output.transpose(1, 2))]
        if end - first < _FP32_BACKWARD_LENGTH and query.dtype != torch.float64:
            parts = [part.float() for part in parts]
        part_grads = flash_attention_cpu_backward(
            *parts, logsumexp[rows, first:end].transpose(1, 2), 0.0, True, scale=scale
        )
        for whole, part in zip(grads, part_grads, strict=True):
            whole[rows, :, first:end] = part
    return grads


@_attention_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_grad(query), _empty_grad(key), _empty_grad(value)


def _empty_grad(tensor: torch.Tensor) -> torch.Tensor:
    """[batch, heads, length, d], in memory [batch, length, heads, d]: what flows back to a projection's output."""
    batch, heads, length, size = tensor.shape
    return tensor.new_empty(batch, length, heads, size).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, bounds, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, bounds)


def _autograd_backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *saved, bounds = ctx.saved_tensors
    return *_attention_backward(grads[0], *saved, bounds, ctx.scale), None, None


_attention.register_autograd(_autograd_backward, setup_context=_setup_context)
