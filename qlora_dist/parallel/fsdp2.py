"""The parallel plan of a model under FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from transformers import PreTrainedModel

from qlora_dist.adapters.attach import has_tied_head, is_adapter_parameter
from qlora_dist.compat.fsdp import MeshPlacement, observe_collectives, offload_frozen_only
from qlora_dist.config.schema import Config
from qlora_dist.model.meta_model import COMPUTE_DTYPES, get_decoder_layers
from qlora_dist.parallel.activation_checkpointing import apply_ac_and_compile
from qlora_dist.parallel.mesh import CommCounter, Meshes


def parallelize_fsdp2(model: PreTrainedModel, meshes: Meshes, config: Config) -> CommCounter:
    """Compile, checkpoint and shard a model in place, and return the counter of all bytes that it will communicate.

    The model is on the meta device, with its adapters attached. On one rank, sharding changes nothing.
    """
    layers = list(get_decoder_layers(model))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apply_ac_and_compile(layers, config.train)
    offload = config.parallel.offload == "base"
    pinned = meshes.base.device_type == "cuda"
    options: dict[str, Any] = {
        "mesh": meshes.base,
        "shard_placement_fn": _shard_placement_fn(model, meshes),
        # bytes are not cast, because they are not of a floating dtype; gradients are summed in fp32
        "mp_policy": MixedPrecisionPolicy(COMPUTE_DTYPES[config.model.compute_dtype], torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
    }
    # embedding and head are separate units, because in the root they would stay gathered during the step
    units = [embedding, *layers, *([] if has_tied_head(model) else [head])]
    sharded = [fully_shard(unit, **options) for unit in units]
    sharded.append(fully_shard(model, **options))

    # Neither is needed in backward. An embedding's gradient does not depend on its values, and the head computes its
    # gradient in forward.
    embedding.set_unshard_in_backward(False)
    if head in units:
        head.set_unshard_in_backward(False)
    if has_tied_head(model):
        embedding.register_forward_pre_hook(_keep_tied_weight_gathered)
    _prefetch(sharded[1 : 1 + len(layers)], config.parallel.prefetch)

    traffic = CommCounter()
    for unit in sharded:
        # Gradients are summed, not averaged, because the loss is divided by the tokens of the whole window before.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        observe_collectives(unit, traffic.add)
        if offload:
            offload_frozen_only(unit)
    return traffic


def _shard_placement_fn(model: nn.Module, meshes: Meshes) -> Callable[[nn.Parameter], Any]:
    """Return a function that shards the base along dim 0, and the adapters over their mesh, A along its long side.

    A is [r, in]. With more than r ranks, sharding its rows would leave most ranks without a row, and pad them to one.
    FSDP2 shards a dimension other than 0 only if the ranks divide it. Modules that are trained whole are sharded by
    rows, because they are read from files.
    """
    to_adapter_mesh = (lambda placement: placement) if meshes.shares_group else MeshPlacement(meshes.adapter)
    shards = meshes.sizes.adapter_shards
    added = {id(parameter) for name, parameter in model.named_parameters() if is_adapter_parameter(name)}

    def place(parameter: nn.Parameter) -> Any:
        if not parameter.requires_grad:
            return None
        wide = id(parameter) in added and parameter.dim() == 2 and parameter.shape[1] > parameter.shape[0]
        return to_adapter_mesh(Shard(1 if wide and parameter.shape[1] % shards == 0 else 0))

    return place


def _keep_tied_weight_gathered(embedding: FSDPModule, inputs: tuple[torch.Tensor, ...]) -> None:
    """Keep tied weights gathered from the lookup to the loss, so that they are gathered once, not twice."""
    embedding.set_reshard_after_forward(inputs[0].is_floating_point())


def _prefetch(layers: list[FSDPModule], count: int) -> None:
    """Gather the next `count` layers while one computes."""
    if count == 0:
        return
    for index, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[index + 1 : index + 1 + count])
        layer.set_modules_to_backward_prefetch(layers[max(0, index - count) : index][::-1])
