"""A model that is ready to use: sharded, with its weights, and with memory for what training needs beside them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from qlora_dist.config.schema import Config
from qlora_dist.io.read_ahead import ReadProgress
from qlora_dist.model.adapter_init import init_adapter
from qlora_dist.model.load_weights import load_weights
from qlora_dist.model.meta_model import LossModel, get_decoder_layers
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.new_token_rows import init_new_token_rows
from qlora_dist.optim.adapter_shards import AdapterShards, adapter_shard_numels
from qlora_dist.optim.optimizer_state import PagedOptimizerState
from qlora_dist.parallel.deepspeed_optimizer import ZeroOptimizerState
from qlora_dist.parallel.engine import parallelize
from qlora_dist.parallel.mesh import CommCounter, Meshes, build_meshes, mesh_sizes
from qlora_dist.parallel.paged_layers import PagedLayers
from qlora_dist.parallel.static_bytes import check_static_bytes
from qlora_dist.runtime.device_memory import free_memory_bytes
from qlora_dist.runtime.environment import RankInfo
from qlora_dist.runtime.heartbeat import record_heartbeat

OptimizerState = PagedOptimizerState | ZeroOptimizerState


@dataclass(frozen=True, kw_only=True)
class ShardedModel:
    """A model on the meta device, cut for this rank."""

    model: LossModel
    config: Config
    ranks: RankInfo
    device: torch.device
    meshes: Meshes
    traffic: CommCounter


@dataclass(frozen=True, kw_only=True)
class LoadedModel(ShardedModel):
    """A sharded model with weights, of which this rank holds no more than its share."""

    paged_layers: PagedLayers | None
    """None unless `parallel.base` is `paged`."""
    static_bytes: int
    """Bytes of the weights that stay on this rank's device."""
    read_bytes: int
    """Bytes that this rank read from the model's folder."""
    load_s: float
    """Seconds spent loading the weights of base and adapters."""


@dataclass(frozen=True, kw_only=True)
class TrainableModel(LoadedModel):
    """A loaded model with memory for the optimizer's states."""

    optimizer_state: OptimizerState
    adapter_shards: AdapterShards


def shard_model(model: LossModel, config: Config, ranks: RankInfo, device: torch.device) -> ShardedModel:
    """Build the meshes, and cut a model in place with the engine that the configuration names. All ranks call this.

    The model is on the meta device, with its adapters attached. Its weights will be on `device`.
    """
    separate_groups = config.parallel.offload == "base"
    meshes = build_meshes(mesh_sizes(config.parallel, ranks), device.type, separate_groups=separate_groups)
    traffic = parallelize(model, meshes, config)
    return ShardedModel(model=model, config=config, ranks=ranks, device=device, meshes=meshes, traffic=traffic)


def load_model(
    sharded: ShardedModel,
    folder: ModelFolder,
    *,
    fill_adapter: Callable[[LossModel], None] | None = None,
    before_reading: Callable[[PagedLayers | None], None] | None = None,
    on_read: Callable[[ReadProgress], None] | None = None,
) -> LoadedModel:
    """Give a sharded model its weights, and check that this rank holds no more than its share. All ranks call this.

    `fill_adapter` sets the adapters' values once the base has its own; without it they get those before training.
    `before_reading` is called once memory is reserved, and `on_read` after each read of this rank. Too little room for
    the layers of a paged base is a `UserError`.
    """
    model, config, device = sharded.model, sharded.config, sharded.device
    paged_layers = _make_paged_layers(sharded) if config.parallel.base == "paged" else None
    if before_reading is not None:
        before_reading(paged_layers)

    def record_read(progress: ReadProgress) -> None:
        record_heartbeat(phase="loading")
        if on_read is not None:
            on_read(progress)

    started = time.perf_counter()
    read_bytes = load_weights(
        model,
        folder,
        device,
        replicas=sharded.meshes.base_replicas,
        offload_base=config.parallel.offload == "base",
        parameter_store=paged_layers,
        on_read=record_read,
    )
    init_new_token_rows(model, folder, config.train.seed, device)
    if fill_adapter is not None:
        fill_adapter(model)
    else:
        init_adapter(model, config.train.seed)
    load_s = time.perf_counter() - started
    page_bytes = (paged_layers.held_bytes, paged_layers.budget) if paged_layers is not None else (0, 0)
    static_bytes = check_static_bytes(model, sharded.meshes.sizes, *page_bytes)
    return LoadedModel(
        **vars(sharded), paged_layers=paged_layers, static_bytes=static_bytes, read_bytes=read_bytes, load_s=load_s
    )


def load_trainable_model(
    sharded: ShardedModel,
    folder: ModelFolder,
    *,
    fill_adapter: Callable[[LossModel], None] | None = None,
    before_reading: Callable[[PagedLayers | None], None] | None = None,
    on_read: Callable[[ReadProgress], None] | None = None,
) -> TrainableModel:
    """Reserve memory for the optimizer's states, then load the model as `load_model` does."""
    optimizer_state = make_optimizer_state(sharded.model, sharded.config, sharded.device)
    loaded = load_model(sharded, folder, fill_adapter=fill_adapter, before_reading=before_reading, on_read=on_read)
    return TrainableModel(**vars(loaded), optimizer_state=optimizer_state, adapter_shards=AdapterShards(sharded.model))


def make_optimizer_state(model: nn.Module, config: Config, device: torch.device) -> OptimizerState:
    """Reserve memory for the optimizer's states of a sharded model. Too little memory is a `UserError`."""
    if config.optim.name == "zero-adamw":
        return ZeroOptimizerState(model, config.optim, config.paging, device)
    return PagedOptimizerState(adapter_shard_numels(model), config.optim, config.paging, device)


def _make_paged_layers(sharded: ShardedModel) -> PagedLayers:
    free_bytes = free_memory_bytes(sharded.device, sharded.ranks.local_world_size)
    layers: list[FSDPModule] = []
    for layer in get_decoder_layers(sharded.model):
        assert isinstance(layer, FSDPModule), "only the fsdp2 engine pages the base"
        layers.append(layer)
    config = sharded.config
    return PagedLayers(sharded.model, layers, sharded.device, config.parallel.resident_bytes, free_bytes, config.paging)
