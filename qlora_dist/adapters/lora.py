"""PEFT's LoRA layer for QuantizedLinear, plain, rank-stabilized, or with DoRA's magnitudes."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import nn

from qlora_dist.adapters.lora_matmul import lora_matmul
from qlora_dist.compat.peft import LoraLayer, LoraVariant, peft
from qlora_dist.layers.experts import QuantizedExperts
from qlora_dist.layers.linear import QuantizedLinear


class QuantizedLoraLayer(nn.Module, LoraLayer):
    """Base class of the LoRA layers whose base layer has a vector of bytes as its weight.

    The attributes are PEFT's, which has no types. The mappings have the adapter's name as key.
    """

    base_layer: QuantizedLinear | QuantizedExperts
    in_features: int
    out_features: int
    active_adapters: list[str]
    disable_adapters: bool
    r: dict[str, int]
    scaling: dict[str, float]
    lora_A: MutableMapping[str, nn.Linear]  # a `ModuleDict`, which has no type parameter
    lora_B: MutableMapping[str, nn.Linear]
    lora_dropout: MutableMapping[str, nn.Module]
    lora_magnitude_vector: MutableMapping[str, _Magnitude]
    lora_variant: dict[str, QuantizedDoraVariant]

    def __init__(
        self,
        base_layer: QuantizedLinear | QuantizedExperts,
        adapter_name: str,
        config: peft.LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        LoraLayer.update_layer(self, adapter_name, r, *args, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, QuantizedLinear | QuantizedExperts)
        return module.in_features, module.out_features


class QuantizedLoraLinear(QuantizedLoraLayer):
    """`y = base(x) + scaling * B(A(dropout(x)))`, registered with PEFT for QuantizedLinear.

    Shapes: lora_A [r, in_features], lora_B [out_features, r]; fp32, computed in x's type once the engine's mixed
    precision has gathered them in it. Merging is not PEFT's here: a QuantizedLinear has no `weight` to merge into.
    """

    base_layer: QuantizedLinear

    def resolve_lora_variant(self, *, config: peft.LoraConfig, **kwargs: Any) -> QuantizedDoraVariant | None:
        return QuantizedDoraVariant() if config.use_dora else None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        names = [] if self.disable_adapters else self.active_adapters
        if len(names) == 1 and names[0] in self.lora_A and names[0] not in self.lora_variant:
            (name,) = names
            dropout = self.lora_dropout[name]
            dropped = dropout(x) if self.training and not isinstance(dropout, nn.Identity) else None
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            return lora_matmul(x, self.base_layer, a, b, self.scaling[name], dropped)
        y: torch.Tensor = self.base_layer(x)
        for name in names:
            if name in self.lora_variant:
                y = self.lora_variant[name].forward(self, active_adapter=name, x=x, result=y)
            elif name in self.lora_A:
                lora_A, lora_B = self.lora_A[name], self.lora_B[name]
                update = lora_B(lora_A(self.lora_dropout[name](x.to(lora_A.weight.dtype))))
                y = y + update.to(y.dtype) * self.scaling[name]
        return y


class _Magnitude(nn.Module):
    """Holder of DoRA's magnitudes, which PEFT's file format names `lora_magnitude_vector.NAME.weight`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class QuantizedDoraVariant(LoraVariant):
    """DoRA: `y = m * (W x + s B A x) / |W + s B A|`, norms by row and detached (arXiv:2402.09353, section 4.3).

    PEFT's own computes B A by sending an identity of in_features squared through the layers and keeps the dense sum
    W + s B A. Here the norm is expanded instead, `|W|^2 + 2 s (W A^T).B + s^2 (B A A^T).B`, whose largest
    intermediate is W itself.
    """

    @staticmethod
    def init(module: QuantizedLoraLinear, adapter_name: str, **kwargs: Any) -> None:
        """Add the magnitudes, fp32[out_features]. Their values need W: `qlora_dist.model.adapter_init` sets them."""
        magnitude = nn.Parameter(torch.empty(module.out_features, device=module.lora_A[adapter_name].weight.device))
        module.lora_magnitude_vector[adapter_name] = _Magnitude(magnitude)

    @staticmethod
    def forward(
        module: QuantizedLoraLinear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return the output of the whole layer, given the output of the base layer."""
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, scaling = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        base = module.base_layer
        weight = base.dequantize(x.dtype).detach()
        norm = dora_weight_norm(weight, lora_A.weight, lora_B.weight, scaling)
        scale = module.lora_magnitude_vector[active_adapter].weight / norm.to(x.dtype)
        without_bias = result if base.bias is None else result - base.bias
        del weight
        if module.training and not isinstance(dropout, nn.Identity):
            # the direction sees the dropped-out input in both of its terms, as in PEFT
            x = dropout(x)
            dropped = base(x) if base.bias is None else base(x) - base.bias
            y: torch.Tensor = result + (scale - 1) * dropped + scale * lora_B(lora_A(x)) * scaling
        else:
            y = result + (scale - 1) * without_bias + scale * lora_B(lora_A(x)) * scaling
        return y


@torch.no_grad()
def dora_weight_norm(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """|W + scaling * B A| of each row, as fp32[out_features]; W: [out, in], A: [r, in], B: [out, r]."""
    a, b = lora_A.float(), lora_B.float()
    squares: torch.Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    cross = ((weight @ lora_A.to(weight.dtype).T).float() * b).sum(dim=1)
    update = ((b @ (a @ a.T)) * b).sum(dim=1)
    return (squares + 2 * scaling * cross + scaling**2 * update).clamp_min(0).sqrt()
