"""Causal attention of packed sequences on the CPU by torch's flash kernels.

Short sequences are differentiated in fp32, which is faster and more exact. In bf16 torch 2.13's backward takes 68 ms
for 16 sequences of 128, and 90 ms for two of 1,024. In fp32 it takes 25 and 115 ms, copies included. These are times of
one thread with AMX and nine heads of 64.

The attention is an operator of torch's library, so that torch.compile treats it as one node. Tracing would unroll the
loop over sequences, whose lengths differ from batch to batch.
"""

from __future__ import annotations

from typing import Any

import torch

from qlora_dist.compat.torch import flash_attention_cpu, flash_attention_cpu_backward
from qlora_dist.sequence_starts import sequence_slices

_FP32_BACKWARD_LENGTH = 384  # positions: backward of shorter sequences is faster in fp32


def packed_causal_attention_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, scale: float
) -> torch.Tensor:
    """Compute causal attention within each sequence, [batch, length, heads, d].

    The query is [batch, heads, length, d], key and value are [batch, heads / groups, length, d]. `starts` is the result
    of `sequence_starts`.
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
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(batch, length, heads, size), query.new_empty(batch, length, heads, dtype=dtype)


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
    """Return [batch, heads, length, d] with the memory format of a projection's output, [batch, length, heads, d]."""
    batch, heads, length, size = tensor.shape
    return tensor.new_empty(batch, length, heads, size).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, starts, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, starts)


def _autograd_backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *saved, starts = ctx.saved_tensors
    return *_attention_backward(grads[0], *saved, starts, ctx.scale), None, None


_attention.register_autograd(_autograd_backward, setup_context=_setup_context)
