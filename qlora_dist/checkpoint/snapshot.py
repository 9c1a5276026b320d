"""A copy of a rank's trainable state on the CPU for a checkpoint, and its restoration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from qlora_dist.adapters.attach import named_trainable_parameters
from qlora_dist.checkpoint.manifest import Manifest, rank_file_name
from qlora_dist.checkpoint.rank_file import RNG_STATE_CPU, RNG_STATE_CUDA
from qlora_dist.checkpoint.resharding import FLAT_DIM, ShardSpec, copy_ops
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry, read_safetensors_header
from qlora_dist.optim.adamw_kernels import state_from_fp32, state_to_fp32
from qlora_dist.optim.optimizer_state import STATE_NAMES, state_tensor_names
from qlora_dist.parallel.deepspeed_optimizer import AdapterOptimizer
from qlora_dist.shard_view import get_flat_shard


@dataclass(frozen=True, kw_only=True)
class TrainableState:
    """The trained parameters' shards on this rank, and their optimizer."""

    shard_specs: dict[str, ShardSpec]
    """Shards of each trained parameter, by name."""
    shard_index: int
    """Index of this rank's shard, the same for all parameters."""
    is_writer: bool
    """False if another rank holds the same shards and writes them."""
    local_shards: dict[str, nn.Parameter]
    """Shards that the optimizer updates, by the parameter's name."""
    optimizer: AdapterOptimizer
    device: torch.device


def trainable_state(
    model: nn.Module, local_shards: list[nn.Parameter], optimizer: AdapterOptimizer, device: torch.device
) -> TrainableState:
    """Return the trainable state of a sharded model, given `AdapterShards.local` and the optimizer of these shards."""
    specs, indices, by_name, is_writer = {}, set(), {}, True
    for (name, parameter), shard in zip(named_trainable_parameters(model), local_shards, strict=True):
        specs[name], index, first_replica = _shard_spec(parameter)
        indices.add(index)
        is_writer = is_writer and first_replica
        by_name[name] = shard
        assert tuple(shard.shape) == specs[name].shard_shape(index), name
    assert len(indices) == 1, "all trained parameters lie on one mesh"
    return TrainableState(
        shard_specs=specs,
        shard_index=indices.pop(),
        is_writer=is_writer,
        local_shards=by_name,
        optimizer=optimizer,
        device=device,
    )


def _shard_spec(parameter: torch.Tensor) -> tuple[ShardSpec, int, bool]:
    """Return a parameter's shards, this rank's index, and whether no rank before this one holds the same shard."""
    flat = get_flat_shard(parameter)
    if flat is not None:
        return ShardSpec(tuple(flat.shape), FLAT_DIM, flat.num_shards), flat.shard_index, flat.is_first_replica
    if not isinstance(parameter, DTensor):
        return ShardSpec(tuple(parameter.shape), 0, 1), 0, True
    mesh, spec_and_index, first = parameter.device_mesh, None, True
    for mesh_dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            assert spec_and_index is None, "FSDP2 shards along one dimension"
            spec = ShardSpec(tuple(parameter.shape), placement.dim, mesh.size(mesh_dim))
            spec_and_index = spec, mesh.get_local_rank(mesh_dim)
        else:
            first = first and mesh.get_local_rank(mesh_dim) == 0
    assert spec_and_index is not None
    return *spec_and_index, first


def snapshot(state: TrainableState) -> dict[str, torch.Tensor]:
    """Return copies of this rank's shards, optimizer states and random states on the CPU, by name in the file.

    Empty shards are left out.
    """
    tensors = {RNG_STATE_CPU: torch.get_rng_state()}
    if state.device.type == "cuda":
        tensors[RNG_STATE_CUDA] = torch.cuda.get_rng_state(state.device)
    if state.is_writer:
        optimizer_states = state.optimizer.optimizer_state.read()
        for (name, parameter), states in zip(state.local_shards.items(), optimizer_states, strict=True):
            if parameter.numel():
                tensors[f"parameter/{name}"] = parameter.detach().to("cpu", copy=True)
                tensors |= {f"{kind}/{name}": values for kind, values in states.items()}
    return tensors


def restore(state: TrainableState, manifest: Manifest, folder: Path) -> None:
    """Restore this rank's shards and optimizer states from a checkpoint of any number of ranks.

    Optimizer states with the saved bits and shards are restored exactly. Else they are converted through fp32, and
    8-bit states are rounded again. Random states are restored only if the world has the saved size.
    """
    state.optimizer.steps = manifest.state["optimizer_steps"]
    with torch.no_grad(), SafetensorsReader() as reader:
        state.optimizer.optimizer_state.write(_saved_shards(state, manifest, folder, reader))
        _restore_random(state, manifest, folder, reader)


def _saved_shards(
    state: TrainableState, manifest: Manifest, folder: Path, reader: SafetensorsReader
) -> Iterator[dict[str, torch.Tensor]]:
    """Restore one parameter after the other, and yield the optimizer states of each."""
    bits, saved_bits = state.optimizer.optimizer_state.bits, manifest.optimizer_bits
    headers: dict[int, dict[str, TensorEntry]] = {}

    def saved(shard: int, name: str, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        if shard not in headers:
            headers[shard] = read_safetensors_header(folder / rank_file_name(shard))
        return {kind: reader.read(headers[shard][f"{kind}/{name}"]) for kind in kinds}

    for name, parameter in state.local_shards.items():
        if not parameter.numel():
            yield {}
            continue
        spec, kinds = manifest.cuts[name], ("parameter", *state_tensor_names(saved_bits))
        if spec == state.shard_specs[name] and bits == saved_bits:
            tensors = saved(state.shard_index, name, kinds)
            parameter.copy_(tensors.pop("parameter"))
            yield tensors
            continue
        values = {kind: torch.empty(parameter.shape) for kind in ("parameter", *STATE_NAMES)}
        copies = copy_ops(spec, state.shard_specs[name], state.shard_index)
        for shard, parts in groupby(copies, key=lambda copy: copy.shard):
            saved_values = state_to_fp32(saved(shard, name, kinds))
            for part in parts:
                for kind, value in values.items():
                    part.target.view(value).copy_(part.source.view(saved_values[kind]))
        parameter.copy_(values.pop("parameter"))
        yield state_from_fp32(values, bits)


def _restore_random(state: TrainableState, manifest: Manifest, folder: Path, reader: SafetensorsReader) -> None:
    if manifest.world_size != torch.distributed.get_world_size():
        return
    header: Mapping[str, TensorEntry] = read_safetensors_header(folder / rank_file_name(torch.distributed.get_rank()))
    torch.set_rng_state(reader.read(header[RNG_STATE_CPU]))
    if state.device.type == "cuda" and RNG_STATE_CUDA in header:
        torch.cuda.set_rng_state(reader.read(header[RNG_STATE_CUDA]), state.device)
