"""LoRA on the experts of a sparse layer, with a pair of matrices per expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_dist.adapters.lora import QuantizedLoraLayer
from qlora_dist.layers.experts import ExpertForward, QuantizedExperts


def peft_swaps_in_out(owner: nn.Module) -> bool:
    """Return whether PEFT confuses the inputs of a module's experts with their outputs.

    It does so if their parameters are [experts, in, out] and no attribute says so (Llama-4), because
    `peft.tuners.lora.ParamWrapper` assumes [experts, out, in]. The update then is the same with A and B replaced by
    B^T and A^T.
    """
    return not hasattr(owner, "is_transposed")


class QuantizedLoraExperts(QuantizedLoraLayer):
    """LoRA layer `y = base(x, expert) + scaling * B[expert](A[expert](x))` for QuantizedExperts.

    The parameters have the layout of `peft.tuners.lora.ParamWrapper`. `lora_A` is [experts * r, in_features] with an
    expert's r rows together. `lora_B` is [out_features, r * experts] with an expert's columns `experts` apart. There is
    no dropout, as in `ParamWrapper`.

    With `swap_in_out`, which is the result of `peft_swaps_in_out`, lora_A is [experts * r, out_features] and lora_B
    [in_features, r * experts].
    """

    base_layer: QuantizedExperts

    def __init__(self, *args: Any, swap_in_out: bool = False, **kwargs: Any) -> None:
        self._swap_in_out = swap_in_out
        super().__init__(*args, **kwargs)

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, *args, **kwargs)
        experts = self.base_layer.experts
        columns, rows = self.in_features, self.out_features
        if self._swap_in_out:
            columns, rows = rows, columns
        self.lora_A[adapter_name] = nn.Linear(columns, experts * r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r * experts, rows, bias=False)

    def expert_forward(self) -> ExpertForward:
        """Return the function of one forward pass.

        A and B are split into experts once per forward pass, so that autograd joins their gradients once.
        """
        base = self.base_layer.expert_forward()
        (name,) = self.active_adapters
        if self.disable_adapters or name not in self.lora_A:
            return base
        experts, r = self.base_layer.experts, self.r[name]
        a = self.lora_A[name].weight.view(experts, r, -1).unbind(0)
        b = self.lora_B[name].weight.view(-1, r, experts).unbind(2)
        if self._swap_in_out:
            a, b = tuple(one.t() for one in b), tuple(one.t() for one in a)
        scaling = self.scaling[name]

        def forward(x: torch.Tensor, expert: int) -> torch.Tensor:
            h = nn.functional.linear(x, a[expert].to(x.dtype))
            return torch.addmm(base(x, expert), h, b[expert].t().to(x.dtype), alpha=scaling)

        return forward
