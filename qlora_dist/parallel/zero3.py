"""The parallel plan of a model under DeepSpeed ZeRO-3, as one function."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.compat.deepspeed import GatherHooks, OnAllGather, Partitioner, gather_parameters, release_parameters
from qlora_dist.compat.torch import module_parameters
from qlora_dist.config.schema import Config
from qlora_dist.model.meta_model import COMPUTE_DTYPES, get_decoder_layers
from qlora_dist.parallel.activation_checkpointing import apply_ac_and_compile
from qlora_dist.parallel.ds_config import ds_config
from qlora_dist.parallel.gradient_reducer import GradientReducer, trainable_units, update_gathered
from qlora_dist.parallel.mesh import CommCounter, Meshes
from qlora_dist.shard_view import FlatShard, full_shape, get_flat_shard


def parallelize_zero3(model: PreTrainedModel, meshes: Meshes, config: Config) -> CommCounter:
    """Compile, checkpoint and shard a model in place with ZeRO-3; see `parallelize_fsdp2`.

    The frozen base is sharded over one group of ranks, and the adapters over another. Every rank allocates its parts,
    and `load_weights` sets their values. The model then has FSDP2's methods: `unshard` and `reshard` of the layers, and
    `set_requires_gradient_sync` of the model.
    """
    layers = list(get_decoder_layers(model))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apply_ac_and_compile(layers, config.train)
    traffic = CommCounter()
    partitioner = Partitioner(meshes.device, _count_all_gathers(traffic, meshes))
    _partition_parameters(model, meshes, config, partitioner)

    settings = ds_config(config, largest_layer_numel(model))["zero_optimization"]
    # A layer is one unit, so its parameters are gathered in one collective per dtype and group. The unit includes the
    # base layer within QuantizedLoraLinear, which is not called as a module, and holds for a recomputed layer too.
    gathering = partitioner.register_hooks(model, layers, settings)
    for module in (embedding, head):
        if not any(parameter.requires_grad for parameter in module.parameters()):
            # an embedding's gradient does not depend on its values, and the head computes its own in forward
            gathering.skip_backward_gather(module)

    gradients = GradientReducer(trainable_units(model), meshes.adapter, traffic, lambda _: gathering.release_all())
    gradients.add_gradient_sync_method(model)
    for layer in layers:  # torch's types allow only tensors and modules as attributes
        layer.unshard = types.MethodType(_unshard, layer)  # type: ignore[assignment]
        layer.reshard = types.MethodType(lambda self: release_parameters(self.parameters()), layer)  # type: ignore[assignment]
    _register_forward_hooks(model, gathering)
    return traffic


def largest_layer_numel(model: PreTrainedModel) -> int:
    """Return the elements of the largest decoder layer, sharded or not. DeepSpeed counts a byte as an element."""
    return max(sum(full_shape(p).numel() for p in layer.parameters()) for layer in get_decoder_layers(model))


def _count_all_gathers(traffic: CommCounter, meshes: Meshes) -> OnAllGather:
    """Return a function that counts gathered bytes by mesh dimension."""
    names = {}
    for mesh in (meshes.adapter, meshes.base):
        assert mesh.mesh_dim_names is not None
        names[mesh.get_group(mesh.ndim - 1).group_name] = mesh.mesh_dim_names[-1]

    def count(group: dist.ProcessGroup, nbytes: int) -> None:
        traffic.add("all_gather", names[group.group_name], nbytes)

    return count


def _partition_parameters(model: nn.Module, meshes: Meshes, config: Config, partitioner: Partitioner) -> None:
    base, adapter = meshes.base.get_group(), meshes.adapter_group
    first_base = meshes.base_replicas is None or meshes.base_replicas.get_local_rank() == 0
    offload = config.parallel.offload == "base"
    dtype = COMPUTE_DTYPES[config.model.compute_dtype]
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            trained = parameter.requires_grad
            group, first = (adapter, meshes.is_first_adapter_replica) if trained else (base, first_base)
            module_parameters(module)[name] = partitioner.partition(
                parameter, group, dtype, on_host=offload and not trained, is_first_replica=first
            )


def _unshard(layer: nn.Module) -> None:
    update_gathered(_flat_shards(layer))
    gather_parameters(layer.parameters())


def _register_forward_hooks(model: nn.Module, gathering: GatherHooks) -> None:
    """Round the values to the gathered dtype before forward. Without a backward pass, release them after it."""
    shards = _flat_shards(model)

    def before(*_: Any) -> None:
        update_gathered(shards)

    def after(*_: Any) -> None:
        if not torch.is_grad_enabled():
            gathering.release_all()

    model.register_forward_pre_hook(before, prepend=True)
    model.register_forward_hook(after)


def _flat_shards(module: nn.Module) -> list[FlatShard]:
    return [shard for parameter in module.parameters() if (shard := get_flat_shard(parameter)) is not None]
