"""The adapters' gradients under ZeRO-3: whole until a window's last backward pass, then summed over ranks in parts."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from qlora_dist.compat.torch import queue_after_backward
from qlora_dist.model.meta_model import get_decoder_layers
from qlora_dist.parallel.comm_counter import CommCounter
from qlora_dist.shard_view import get_flat_shard


def trainable_units(model: PreTrainedModel) -> list[list[nn.Parameter]]:
    """The trained parameters of each decoder layer together, and the others one by one."""
    units = [[p for p in layer.parameters() if p.requires_grad] for layer in get_decoder_layers(model)]
    in_layers = {id(p) for unit in units for p in unit}
    units += [[p] for p in model.parameters() if p.requires_grad and id(p) not in in_layers]
    return [unit for unit in units if unit]


class _Unit:
    """The trained parameters whose gradients travel together."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.waiting = len(self.parameters)
        """How many have no gradient yet in this backward pass."""


class GradientReducer:
    """Sums gradients in fp32, a unit at a time, as soon as backward has come through it.

    ZeRO-3 itself would do so after every micro-batch. Here it is once a window, as under FSDP2; until then a rank has
    whole gradients of the adapters.

    Args:
        units: lists of trained parameters.
        mesh: of the adapters: 1-D, or (replica, shard).
        traffic: counts what is communicated.
        after_backward: called at the end of each backward pass, with whether it was the window's last.
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

    def answer(self, model: nn.Module) -> None:
        """Have a model answer to the name under which FSDP2 is told of a window's last backward pass."""

        def set_requires_gradient_sync(_: nn.Module, last: bool) -> None:
            self.sync = last

        # torch's types let a module have tensors and modules as attributes, and nothing else
        model.set_requires_gradient_sync = types.MethodType(set_requires_gradient_sync, model)  # type: ignore[assignment]

    def _add(self, unit: _Unit, parameter: nn.Parameter) -> None:
        if not self._in_backward:
            self._in_backward = True
            queue_after_backward(self._end)
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.float(), None
        if (shard := get_flat_shard(parameter)) is not None:
            shard.had_grad = True
        before = self._sums.get(parameter)
        self._sums[parameter] = gradient if before is None else before.add_(gradient)
        unit.waiting -= 1
        if self.sync and unit.waiting == 0:
            self._reduce(unit)

    def _end(self) -> None:
        """After a backward pass."""
        for unit in self._units:
            if self.sync and unit.waiting > 0:  # experts that no token has come to
                self._reduce(unit)
            unit.waiting = len(unit.parameters)
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
            shard.gradient = gradient[: shard.local.numel()]

    def _sum(self, parts: torch.Tensor) -> torch.Tensor:
        """[shards, n] -> [n], this rank's row, summed over all ranks."""
        own = parts[0]
        if parts.shape[0] > 1:
            own = torch.empty_like(parts[0])
            dist.reduce_scatter_single(own, parts.view(-1), group=self._mesh.get_group(self._mesh.ndim - 1))
            self._traffic.add("reduce_scatter", self._names[-1], parts.nbytes - own.nbytes)
        if self._mesh.ndim > 1:
            replicas = self._mesh.size(0)
            dist.all_reduce(own, group=self._mesh.get_group(0))
            self._traffic.add("all_reduce", "replica", 2 * own.nbytes * (replicas - 1) // replicas)
        return own

    @property
    def _names(self) -> tuple[str, ...]:
        assert self._mesh.mesh_dim_names is not None
        return self._mesh.mesh_dim_names
