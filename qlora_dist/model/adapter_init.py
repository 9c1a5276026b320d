"""The values that adapters have before training."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from qlora_dist.adapters.attach import init_lora_weight, is_lora_parameter
from qlora_dist.adapters.lora import QuantizedLoraLinear, dora_weight_norm
from qlora_dist.layers.linear import QuantizedLinear
from qlora_dist.model.meta_model import LossModel, get_decoder_layers
from qlora_dist.shard_view import full_shape, local_slice, local_tensor


@runtime_checkable
class _ShardedLayer(Protocol):
    """A layer that an engine shards. FSDP2 gives it these methods by a class, the other engines as attributes."""

    def unshard(self) -> object:
        """Gather the layer's parameters."""

    def reshard(self) -> None:
        """Release the gathered parameters."""


@torch.no_grad()
def init_adapter(model: LossModel, seed: int) -> None:
    """Set this rank's shards of the adapters to their values before training. All ranks call this.

    The model is sharded and has the weights of its base. The values do not depend on the number of ranks.
    """
    for name, parameter in model.named_parameters():
        if is_lora_parameter(name):
            values = init_lora_weight(name, full_shape(parameter), seed)
            if values is not None:
                local_tensor(parameter).copy_(local_slice(parameter, values))
    if any("lora_magnitude_vector" in name for name, _ in model.named_parameters()):
        _init_dora_magnitudes(model)


def _init_dora_magnitudes(model: LossModel) -> None:
    """Set DoRA's magnitudes to the row norms of W. One layer at a time is gathered."""
    for layer in get_decoder_layers(model):
        norms = {}
        if isinstance(layer, _ShardedLayer):
            layer.unshard()
        for name, module in layer.named_modules():
            if isinstance(module, QuantizedLoraLinear):
                assert isinstance(module.base_layer, QuantizedLinear)
                for adapter in module.lora_magnitude_vector:
                    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                    weight = module.base_layer.dequantize(a.dtype)
                    norm = dora_weight_norm(weight, a, b, module.scaling[adapter])
                    norms[f"{name}.lora_magnitude_vector.{adapter}.weight"] = norm
        if isinstance(layer, _ShardedLayer):
            layer.reshard()
        for name, norm in norms.items():
            parameter = layer.get_parameter(name)
            local_tensor(parameter).copy_(local_slice(parameter, norm))
