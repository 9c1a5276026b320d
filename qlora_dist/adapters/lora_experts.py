"""LoRA on the experts of a sparse layer: a pair of matrices for each."""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from qlora_dist.nf4.experts import ExpertFunction, NF4Experts


class LoraExperts(nn.Module, LoraLayer):
    """`y = base(x, expert) + scaling * B[expert](A[expert](x))`, registered with PEFT for NF4Experts.

    The matrices of all experts are one parameter each, in the shapes and the order of `peft.tuners.lora.ParamWrapper`,
    which this is elsewhere: lora_A [experts * r, in_features], an expert's r rows together; lora_B
    [out_features, r * experts], an expert's columns `experts` apart. Like it, it knows no dropout.
    """

    def __init__(
        self,
        base_layer: NF4Experts,
        adapter_name: str,
        config: peft.LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)
        self.lora_A[adapter_name] = nn.Linear(self.in_features, base_layer.experts * r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r * base_layer.experts, self.out_features, bias=False)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, NF4Experts)
        return module.in_features, module.out_features

    def bind(self) -> ExpertFunction:
        """As NF4Experts.bind. A and B are taken apart once, so that their gradients are put together once."""
        base = self.get_base_layer().bind()
        if self.disable_adapters:
            return base
        (name,) = self.active_adapters
        experts, r = self.get_base_layer().experts, self.r[name]
        a = self.lora_A[name].weight.view(experts, r, -1).unbind(0)
        b = self.lora_B[name].weight.view(-1, r, experts).unbind(2)
        scaling = self.scaling[name]

        def forward(x: torch.Tensor, expert: int) -> torch.Tensor:
            h = nn.functional.linear(x, a[expert].to(x.dtype))
            return torch.addmm(base(x, expert), h, b[expert].t().to(x.dtype), alpha=scaling)

        return forward
