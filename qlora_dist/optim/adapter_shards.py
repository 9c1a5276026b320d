"""This rank's shards of the adapters, as an optimizer takes them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from qlora_dist.adapters.attach import is_lora_b_parameter, named_trainable_parameters
from qlora_dist.shard_view import get_flat_shard, local_tensor, pop_local_grad


class AdapterShards:
    """The adapters' local shards as plain parameters that alias the engine's.

    An optimizer of plain tensors is faster than one of DTensors, and bitsandbytes' kernels take no DTensor.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in named_trainable_parameters(model)]
        self._sharded = [p for _, p in named_trainable_parameters(model)]
        self._had_grad = [False] * len(self._sharded)
        self.local = [nn.Parameter(local_tensor(p).detach()) for p in self._sharded]
        self.is_lora_b = [is_lora_b_parameter(name) for name in self._names]

    def collect_grads(self) -> list[torch.Tensor]:
        """Move the engine's gradients to the local shards, and return the gradients of the shards that are not empty.

        The gradient of an adapter that takes no part in the loss is zero, so its B stays zero.
        """
        for index, (sharded, local) in enumerate(zip(self._sharded, self.local, strict=True)):
            gradient, flat = pop_local_grad(sharded), get_flat_shard(sharded)
            self._had_grad[index] |= gradient is not None if flat is None else flat.had_grad
            local.grad = (torch.zeros_like(local) if gradient is None else gradient) if local.numel() else None
        return [p.grad for p in self.local if p.grad is not None]

    def find_unused_parameters(self) -> list[str]:
        """Return the names of the parameters that had no gradient on any rank. All ranks call this after a step."""
        had_grad = torch.tensor(self._had_grad, dtype=torch.int32, device=self.local[0].device)
        dist.all_reduce(had_grad, dist.ReduceOp.MAX)
        return [name for name, had in zip(self._names, had_grad.tolist(), strict=True) if not had]

    def zero_grad(self) -> None:
        for local in self.local:
            local.grad = None


def adapter_shard_numels(model: nn.Module) -> list[int]:
    """Return the elements of this rank's adapter shards, in the order of `AdapterShards`; the model may be on meta."""
    return [local_tensor(parameter).numel() for _, parameter in named_trainable_parameters(model)]
