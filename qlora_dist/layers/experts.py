"""Weights of a sparse layer's experts: many matrices in one vector of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qlora_dist.layers.dequantize import WeightLayout, dequantize, describe_layout

ExpertForward = Callable[[torch.Tensor, int], torch.Tensor]


class QuantizedExperts(nn.Module):
    """One projection of all experts, `y = x @ W[expert].T`, differentiable in x only.

    `packed: uint8[experts * matrices * layout.total_bytes]` concatenates the quantized matrices. Each matrix has its
    own blocks and scales, so one expert is dequantized without the others. An expert's weight stacks its `matrices`
    (such as gate and up) along the rows, as in the checkpoint.
    """

    def __init__(
        self, layout: WeightLayout, experts: int, matrices: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.layout, self.experts, self.matrices = layout, experts, matrices
        rows, self.in_features = layout.shape
        self.out_features = matrices * rows
        nbytes = experts * matrices * layout.total_bytes
        self.packed = nn.Parameter(torch.empty(nbytes, dtype=torch.uint8, device=device), requires_grad=False)

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an expert's weight, dtype[out_features, in_features]. Under an engine, `packed` must be gathered."""
        size = self.layout.total_bytes
        vectors = self.packed.narrow(0, expert * self.matrices * size, self.matrices * size).split(size)
        parts = [dequantize(vector, self.layout, dtype) for vector in vectors]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def expert_forward(self) -> ExpertForward:
        """Return the function of one forward pass: x [tokens, in_features], expert -> [tokens, out_features]."""
        return lambda x, expert: _Matmul.apply(x, self, expert)

    def extra_repr(self) -> str:
        quantization = describe_layout(self.layout)
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"experts={self.experts}, {features}, {quantization}"


class _Matmul(torch.autograd.Function):
    """Product that saves only the module and the expert's number for backward, for QuantizedLinear's reason."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: QuantizedExperts, expert: int) -> torch.Tensor:
        ctx.module, ctx.expert = module, expert
        return nn.functional.linear(x, module.dequantize(expert, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        return grad @ ctx.module.dequantize(ctx.expert, grad.dtype), None, None
