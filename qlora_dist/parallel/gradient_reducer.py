"""The adapters under ZeRO: gradients that are reduced to shards, and values that are rounded before gathering."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from qlora_dist.compat.torch import foreach_copy_, queue_after_backward
from qlora_dist.model.meta_model import get_decoder_layers
from qlora_dist.parallel.mesh import CommCounter
from qlora_dist.shard_view import FlatShard, get_flat_shard


@torch.no_grad()
def update_gathered(shards: Sequence[FlatShard]) -> None:
    """Round the values of shards to the type in which they are gathered, where the types differ."""
    rounded = [shard for shard in shards if shard.gathered is not shard.padded]
    if rounded:
        foreach_copy_([shard.gathered for shard in rounded], [shard.padded for shard in rounded])


def trainable_units(model: PreTrainedModel) -> list[list[nn.Parameter]]:
    """Return the trained parameters of each decoder layer as one unit, and each other trained parameter as a unit."""
    units = [[p for p in layer.parameters() if p.requires_grad] for layer in get_decoder_layers(model)]
    in_layers = {id(p) for unit in units for p in unit}
    units += [[p] for p in model.parameters() if p.requires_grad and id(p) not in in_layers]
    return [unit for unit in units if unit]


class _Unit:
    """Trained parameters whose gradients are reduced together."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.pending = len(self.parameters)
        """Number of parameters without a gradient in this backward pass."""


class GradientReducer:
    """A sum of gradients over ranks in fp32, one unit at a time, as soon as backward has passed the unit.

    DeepSpeed's ZeRO-3 would reduce after every micro-batch. This reduces once per window, as FSDP2 does. Until then a
    rank has whole gradients of the adapters.

    `mesh` is the adapters', 1-D or (replica, shard). `after_backward` is called at the end of each backward pass, and
    its argument says whether it was the window's last.
    """

    def __init__(
        self,
        units: Sequence[Sequence[nn.Parameter]],
        mesh: DeviceMesh,
        traffic: CommCounter,
        after_backward: Callable[[bool], None],
    ) -> None:
        self.sync = True
        """Whether the next backward pass is the window's last."""
        self._units = [_Unit(unit) for unit in units]
        self._mesh, self._traffic, self._after_backward = mesh, traffic, after_backward
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        self._in_backward = False
        for unit in self._units:
            for parameter in unit.parameters:
                parameter.register_post_accumulate_grad_hook(lambda p, unit=unit: self._add(unit, p))

    def add_gradient_sync_method(self, model: nn.Module) -> None:
        """Give a model FSDP2's `set_requires_gradient_sync`, which announces a window's last backward pass."""
        # torch's types allow only tensors and modules as attributes of a module
        model.set_requires_gradient_sync = types.MethodType(  # type: ignore[assignment]
            lambda _, requires_gradient_sync: self._set_sync(requires_gradient_sync), model
        )

    def _set_sync(self, requires_gradient_sync: bool) -> None:
        self.sync = requires_gradient_sync

    def _add(self, unit: _Unit, parameter: nn.Parameter) -> None:
        if not self._in_backward:
            self._in_backward = True
            queue_after_backward(self._finish_backward)
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.float(), None
        if (shard := get_flat_shard(parameter)) is not None:
            shard.had_grad = True
        before = self._sums.get(parameter)
        self._sums[parameter] = gradient if before is None else before.add_(gradient)
        unit.pending -= 1
        if self.sync and unit.pending == 0:
            self._reduce(unit)

    def _finish_backward(self) -> None:
        for unit in self._units:
            if self.sync and unit.pending > 0:  # experts that got no token
                self._reduce(unit)
            unit.pending = len(unit.parameters)
        self._in_backward = False
        self._after_backward(self.sync)

    def _reduce(self, unit: _Unit) -> None:
        shards = [get_flat_shard(parameter) for parameter in unit.parameters]
        sizes, count, device = [], self._mesh.size(-1), None
        columns = []
        for parameter, shard in zip(unit.parameters, shards, strict=True):
            assert shard is not None
            size, gradient = shard.padded.numel(), self._sums.pop(parameter, None)
            sizes.append(size)
            device = shard.padded.device
            if gradient is None:
                gradient = torch.zeros(shard.shape, device=device)
            columns.append(
                nn.functional.pad(gradient.reshape(-1), (0, size * count - gradient.numel())).view(count, -1)
            )
        own = self._sum(torch.cat(columns, dim=1))
        for shard, gradient in zip(shards, own.split(sizes), strict=True):
            assert shard is not None
            shard.grad = gradient[: shard.local.numel()]

    def _sum(self, parts: torch.Tensor) -> torch.Tensor:
        """Sum [shards, n] over all ranks, and return this rank's row [n]."""
        own = parts[0]
        if parts.shape[0] > 1:
            own = torch.empty_like(parts[0])
            dist.reduce_scatter_single(own, parts.view(-1), group=self._mesh.get_group(self._mesh.ndim - 1))
            assert self._mesh.mesh_dim_names is not None
            self._traffic.add("reduce_scatter", self._mesh.mesh_dim_names[-1], parts.nbytes - own.nbytes)
        if self._mesh.ndim > 1:
            replicas = self._mesh.size(0)
            dist.all_reduce(own, group=self._mesh.get_group(0))
            self._traffic.add("all_reduce", "replica", 2 * own.nbytes * (replicas - 1) // replicas)
        return own
