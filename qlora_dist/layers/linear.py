"""Linear layer whose frozen weight is one vector of bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qlora_dist.compat.transformers import mark_initialized
from qlora_dist.layers.dequantize import WeightLayout, dequantize, describe_layout


class QuantizedLinear(nn.Module):
    """Linear layer `y = x @ dequantize(packed).T + bias`, differentiable in x only.

    `packed` is an ordinary frozen parameter, so FSDP2 and ZeRO-3 shard codes and scales together. It must be uint8,
    because engines cast floating parameters to the compute type, and CUDA's multi-tensor copies canonicalize NaN
    payloads of bf16 words.

    The bias[out_features] is frozen too. `bias_dtype` is the type of the bias and of `weight`.
    """

    is_weight_read: bool = False
    """Whether the model's code reads `weight` itself, so that an adapter around the layer has no effect."""

    def __init__(
        self,
        layout: WeightLayout,
        *,
        bias: bool = False,
        bias_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.dtype = layout, bias_dtype
        self.out_features, self.in_features = layout.shape
        self.packed = nn.Parameter(
            torch.empty(layout.total_bytes, dtype=torch.uint8, device=device), requires_grad=False
        )
        self.bias = (
            nn.Parameter(torch.empty(self.out_features, dtype=bias_dtype, device=device), requires_grad=False)
            if bias
            else None
        )

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight, dtype[out_features, in_features]. Under an engine, `packed` must be gathered."""
        return dequantize(self.packed, self.layout, dtype)

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized weight, [out_features, in_features], for code that reads it; computed at each access.

        If an engine has not gathered `packed`, it is on meta.
        """
        if self.packed.is_meta or isinstance(self.packed, DTensor) or self.packed.numel() != self.layout.total_bytes:
            placeholder = torch.empty(self.layout.shape, dtype=self.dtype, device="meta")
            mark_initialized(placeholder)
            return placeholder
        return self.dequantize(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x: [..., in_features] to [..., out_features], in x's type."""
        y: torch.Tensor = _Matmul.apply(x, self)
        return y

    def extra_repr(self) -> str:
        quantization = describe_layout(self.layout)
        return f"in_features={self.in_features}, out_features={self.out_features}, {quantization}"


class _Matmul(torch.autograd.Function):
    """Product that saves only the module for backward, not the gathered bytes or the dequantized weight.

    The engine frees `packed` after forward, and gathers it again before backward reads `module.packed`. A saved tensor
    would keep every layer's gathered bytes alive (ZeRO-3), or point to freed memory.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: QuantizedLinear) -> torch.Tensor:
        ctx.module = module
        return nn.functional.linear(x, module.dequantize(x.dtype), module.bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ ctx.module.dequantize(grad.dtype), None
