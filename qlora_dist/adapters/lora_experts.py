"""LoRA on the experts of a sparse layer: a pair of matrices for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_dist.adapters.lora import NF4LoraLayer
from qlora_dist.nf4.experts import ExpertForward, NF4Experts


def peft_swaps_in_out(owner: nn.Module) -> bool:
    """Whether PEFT takes the inputs of a module's experts for their outputs.

    Their parameters are [experts, in, out] then, and no attribute says so (Llama-4): `peft.tuners.lora.ParamWrapper`
    reads [experts, out, in]. The update is the same, with A's place taken by B's transpose and B's by A's.
    """
    return not hasattr(owner, "is_transposed")


class NF4LoraExperts(NF4LoraLayer):
    """`y = base(x, expert) + scaling * B[expert](A[expert](x))`, registered with PEFT for NF4Experts.

    The matrices of all experts are one parameter each, in the shapes and the order of `peft.tuners.lora.ParamWrapper`,
    which this is elsewhere: lora_A [experts * r, in_features], an expert's r rows together; lora_B
    [out_features, r * experts], an expert's columns `experts` apart. Like it, it knows no dropout.

    Args:
        swapped: whether lora_A is [experts * r, out_features] and lora_B [in_features, r * experts] (`peft_swaps_in_out`).
    """

    base_layer: NF4Experts

    def __init__(self, *args: Any, swap_in_out: bool = False, **kwargs: Any) -> None:
        self._swapped = swap_in_out
        super().__init__(*args, **kwargs)

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        """PEFT's, with a pair of matrices for each expert."""
        super().update_layer(adapter_name, r, *args, **kwargs)
        experts = self.base_layer.experts
        columns, rows = self.in_features, self.out_features
        if self._swapped:
            columns, rows = rows, columns
        self.lora_A[adapter_name] = nn.Linear(columns, experts * r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r * experts, rows, bias=False)

    def bind(self) -> ExpertForward:
        """As NF4Experts.bind. A and B are taken apart once, so that their gradients are put together once."""
        base = self.base_layer.bind()
        (name,) = self.active_adapters
        if self.disable_adapters or name not in self.lora_A:
            return base
        experts, r = self.base_layer.experts, self.r[name]
        a = self.lora_A[name].weight.view(experts, r, -1).unbind(0)
        b = self.lora_B[name].weight.view(-1, r, experts).unbind(2)
        if self._swapped:
            a, b = tuple(one.t() for one in b), tuple(one.t() for one in a)
        scaling = self.scaling[name]

        def forward(x: torch.Tensor, expert: int) -> torch.Tensor:
            h = nn.functional.linear(x, a[expert].to(x.dtype))
            return torch.addmm(base(x, expert), h, b[expert].t().to(x.dtype), alpha=scaling)

        return forward
