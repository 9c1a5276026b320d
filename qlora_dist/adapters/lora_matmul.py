"""Base layer and LoRA as one differentiable step, `y = W x + b + scaling * B(A x)`, with few passes over y.

With autograd, scaling, cast and addition of the update are separate passes over tensors as large as y, in forward and
in backward. Here the matrix multiplication adds B's product to y. With g = dL/dy and h = A x, the chain rule gives:

    dL/dh = scaling * B^T g        dL/dx = W^T g + A^T dL/dh
    dL/dB = scaling * g h^T        dL/dA = dL/dh x^T
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from qlora_dist.layers.linear import QuantizedLinear
from qlora_dist.nf4.nf4_layout import NF4Layout, QuantType
from qlora_dist.nf4.quantize import dequantize_weight

_LoraGradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]


def lora_matmul(
    x: torch.Tensor,
    base: QuantizedLinear,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    dropped: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output of a base layer with its adapter, differentiable in x, dropped, A and B.

    Backward needs only x (or dropped), h and references to A and B. It reads `base.packed` again, which the engine has
    gathered by then. The base layer is not called as a module, so its hooks do not run.

    The shapes are x [..., in_features], A [r, in_features], B [out_features, r] and the output [..., out_features]. All
    are computed in x's type. `dropped` is x after dropout, the adapter's input; None: x.
    """
    shape = (*x.shape[:-1], base.out_features)
    rows = x.reshape(-1, x.shape[-1])
    adapter_rows = None if dropped is None else dropped.reshape(-1, x.shape[-1])
    a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
    if torch.compiler.is_compiling():
        assert isinstance(base.layout, NF4Layout), "the configuration refuses other layouts"
        y: torch.Tensor = _lora_matmul_op(
            rows, adapter_rows, a, b, base.packed, base.bias, scaling, *_layout_args(base.layout)
        )[0]
        return y.view(shape)
    y, h = _LoraMatmul.apply(rows, adapter_rows, a, b, base, scaling)
    with torch.no_grad():
        _compute_output(y, rows, h, b, base.dequantize(x.dtype), base.bias, scaling)
    return y.view(shape)


class _LoraMatmul(torch.autograd.Function):
    """Product that saves the tensors of backward, and returns an uninitialized y and h.

    y is computed afterwards. When torch recomputes a checkpointed layer, it stops once the last tensor that backward
    needs is saved. So the last projection of a layer, a quarter of its work, is not computed a second time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        base: QuantizedLinear,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.base, ctx.scaling, ctx.dropout = base, scaling, dropped is not None
        adapter_input = x if dropped is None else dropped
        h = adapter_input @ a.t()
        ctx.save_for_backward(adapter_input, a, b, h)
        ctx.mark_non_differentiable(h)
        return x.new_empty(x.shape[0], base.out_features), h

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight = ctx.base.dequantize(grads[0].dtype) if ctx.needs_input_grad[0] else None
        gradients = _gradients(grads[0], ctx.saved_tensors, weight, ctx.scaling, dropout=ctx.dropout)
        return *gradients, None, None


def _compute_output(
    y: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)
    y.addmm_(h, b.t(), alpha=scaling)


def _gradients(
    grad: torch.Tensor,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    weight: torch.Tensor | None,
    scaling: float,
    *,
    dropout: bool,
) -> _LoraGradients:
    """Return the gradients of x, dropped, A and B, given the gradient of y.

    `saved` holds the adapter's input, A, B and h. Without a base weight, x needs no gradient. Without dropout, the
    gradient of x is the sum of both paths.
    """
    adapter_input, a, b, h = saved
    grad_h = (grad @ b).mul_(scaling)
    grad_a = grad_h.t() @ adapter_input
    grad_b = (h.t() @ grad).mul_(scaling).t()
    grad_x = grad @ weight if weight is not None else None
    if dropout:
        return grad_x, grad_h @ a, grad_a, grad_b
    if grad_x is not None:
        grad_x.addmm_(grad_h, a)
    return grad_x, None, grad_a, grad_b


# --- one operator for torch.compile, which it does not trace into -----------------------------------------------------


def _layout_args(layout: NF4Layout) -> tuple[int, int, str, int, bool, str]:
    out_features, in_features = layout.shape
    return out_features, in_features, layout.quant_type, layout.block_size, layout.double_quant, layout.dtype


@cache
def _layout_from_args(
    out_features: int, in_features: int, quant_type: QuantType, block_size: int, dtype: str, *, double_quant: bool
) -> NF4Layout:
    return NF4Layout(
        shape=(out_features, in_features),
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        dtype=dtype,
    )


@torch.library.custom_op("qlora_dist::lora_matmul", mutates_args=())
def _lora_matmul_op(
    x: torch.Tensor,
    dropped: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    out_features: int,
    in_features: int,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    dtype: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = _layout_from_args(out_features, in_features, quant_type, block_size, dtype, double_quant=double_quant)
    h = (x if dropped is None else dropped) @ a.t()
    y = x.new_empty(x.shape[0], out_features)
    _compute_output(y, x, h, b, dequantize_weight(packed, layout, x.dtype), bias, scaling)
    return y, h


@_lora_matmul_op.register_fake
def _(
    x: torch.Tensor, dropped: Any, a: torch.Tensor, b: Any, packed: Any, bias: Any, scaling: Any, out: int, *layout: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], out), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("qlora_dist::lora_matmul_backward", mutates_args=())
def _lora_matmul_backward_op(
    grad: torch.Tensor,
    adapter_input: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    h: torch.Tensor,
    packed: torch.Tensor | None,
    scaling: float,
    dropout: bool,
    out_features: int,
    in_features: int,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    dtype: str,
) -> list[torch.Tensor]:
    layout = _layout_from_args(out_features, in_features, quant_type, block_size, dtype, double_quant=double_quant)
    weight = dequantize_weight(packed, layout, grad.dtype) if packed is not None else None
    grads = _gradients(grad, (adapter_input, a, b, h), weight, scaling, dropout=dropout)
    return [g.contiguous() for g in grads if g is not None]


@_lora_matmul_backward_op.register_fake
def _(
    grad: torch.Tensor,
    adapter_input: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    h: torch.Tensor,
    packed: torch.Tensor | None,
    scaling: float,
    dropout: bool,
    *layout: Any,
) -> list[torch.Tensor]:
    inputs = [adapter_input] * ((packed is not None) + dropout)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*inputs, a, b)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, dropped, a, b, packed, _, ctx.scaling, *ctx.layout = inputs
    ctx.dropout = dropped is not None
    # packed, whose memory the engine frees and fills again, and not the dequantized weight
    ctx.save_for_backward(x if dropped is None else dropped, a, b, output[1], packed)


def _autograd_backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *saved, packed = ctx.saved_tensors
    wants_x = ctx.needs_input_grad[0]
    op_grads = _lora_matmul_backward_op(
        grads[0].contiguous(), *saved, packed if wants_x else None, ctx.scaling, ctx.dropout, *ctx.layout
    )
    grad_x = op_grads.pop(0) if wants_x else None
    grad_dropped = op_grads.pop(0) if ctx.dropout else None
    return grad_x, grad_dropped, *op_grads, *[None] * (3 + len(ctx.layout))


_lora_matmul_op.register_autograd(_autograd_backward, setup_context=_setup_context)
