"""The parallel plan of a model under ZeRO's stage 2: only gradients and optimizer states are sharded.

Nothing is gathered to compute. A rank updates its part of each adapter, and once per step the parts are gathered. If
the base fits on each device, no plan communicates less. This stage uses no code of DeepSpeed.
"""

from __future__ import annotations

import types

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.compat.torch import module_parameters
from qlora_dist.compat.transformers import mark_initialized
from qlora_dist.config.schema import Config
from qlora_dist.model.meta_model import COMPUTE_DTYPES, get_decoder_layers
from qlora_dist.parallel.activation_checkpointing import apply_ac_and_compile
from qlora_dist.parallel.gradient_reducer import GradientReducer, trainable_units, update_gathered
from qlora_dist.parallel.mesh import CommCounter, Meshes
from qlora_dist.shard_view import FlatShard, get_flat_shard, set_flat_shard


def parallelize_zero2(model: PreTrainedModel, meshes: Meshes, config: Config) -> CommCounter:
    """Compile and checkpoint a model in place, and shard its adapters' gradients and updates; see `parallelize_fsdp2`.

    The base is whole on each rank.
    """
    layers = list(get_decoder_layers(model))
    apply_ac_and_compile(layers, config.train)
    dtype, group = COMPUTE_DTYPES[config.model.compute_dtype], meshes.adapter_group
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                module_parameters(module)[key] = _whole_parameter(
                    parameter, group, dtype, meshes.device, is_first_replica=meshes.is_first_adapter_replica
                )
            elif parameter.is_floating_point():
                # transformers keeps some in fp32 files; they too are computed with in `dtype`
                module_parameters(module)[key] = nn.Parameter(parameter.to(dtype), requires_grad=False)

    traffic = CommCounter()
    units = trainable_units(model)
    assert meshes.adapter.mesh_dim_names is not None
    updates = _UpdateGather(units, group, traffic, meshes.adapter.mesh_dim_names[-1])
    gradients = GradientReducer(units, meshes.adapter, traffic, updates.mark_stale_after_backward)
    gradients.add_gradient_sync_method(model)
    model.register_forward_pre_hook(lambda *_: updates.gather(), prepend=True)
    for module in (*layers, model):
        module.unshard = types.MethodType(lambda self: updates.gather(), module)
        module.reshard = types.MethodType(lambda self: updates.mark_stale(), module)
    return traffic


def _whole_parameter(
    parameter: nn.Parameter,
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_first_replica: bool,
) -> nn.Parameter:
    """Return a whole parameter in the compute dtype, with a `FlatShard` that this rank updates."""
    numel, size = parameter.numel(), -(-parameter.numel() // group.size())
    whole = torch.zeros(size * group.size(), dtype=dtype, device=device)
    own = whole[group.rank() * size : (group.rank() + 1) * size]
    values = own if dtype == parameter.dtype else torch.zeros(size, dtype=parameter.dtype, device=device)
    whole_parameter = nn.Parameter(whole[:numel].view(parameter.shape))
    mark_initialized(whole_parameter)
    shard = FlatShard(
        shape=parameter.shape, padded=values, gathered=own, group=group, is_first_replica=is_first_replica, full=whole
    )
    set_flat_shard(whole_parameter, shard)
    return whole_parameter


class _UpdateGather:
    """A gather of the parts that other ranks have updated, before the next forward pass."""

    def __init__(
        self, units: list[list[nn.Parameter]], group: dist.ProcessGroup, traffic: CommCounter, dim: str
    ) -> None:
        self._units = [[shard for p in unit if (shard := get_flat_shard(p)) is not None] for unit in units]
        self._group, self._traffic, self._dim = group, traffic, dim
        self._is_stale = True

    def mark_stale(self) -> None:
        """Gather before the next forward pass, because values change."""
        self._is_stale = True

    def mark_stale_after_backward(self, last: bool) -> None:
        """Gather after a window's last backward pass, because the optimizer changes the values."""
        self._is_stale = self._is_stale or last

    @torch.no_grad()
    def gather(self) -> None:
        """Gather the updated parts with one collective per unit. All ranks call this."""
        if not self._is_stale:
            return
        self._is_stale = False
        for shards in self._units:
            update_gathered(shards)
            if self._group.size() == 1:
                continue
            own = torch.cat([shard.gathered for shard in shards])
            parts = own.new_empty(self._group.size() * own.numel())
            dist.all_gather_single(parts, own, group=self._group)
            self._traffic.add("all_gather", self._dim, parts.nbytes - own.nbytes)
            columns = parts.view(self._group.size(), -1).split([shard.gathered.numel() for shard in shards], dim=1)
            for shard, column in zip(shards, columns, strict=True):
                assert shard.full is not None
                shard.full.view_as(column).copy_(column)
