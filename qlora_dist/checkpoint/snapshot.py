"""What of a rank goes into a checkpoint, copied off the device; and back."""

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
from qlora_dist.optim.convert import state_from_fp32, state_to_fp32
from qlora_dist.optim.optimizer_state import STATE_NAMES, state_tensor_names
from qlora_dist.parallel.deepspeed_optimizer import AdapterOptimizer
from qlora_dist.shard_view import get_flat_shard


@dataclass(frozen=True)
class TrainableState:
    """What is trained on this rank: names, cuts, and the local shards that the optimizer updates."""

    cuts: dict[str, ShardSpec]
    shard: int
    """Which part of each is this rank's."""
    is_writer: bool
    """False where another rank holds the same shards and writes them."""
    local: dict[str, nn.Parameter]
    optimizer: AdapterOptimizer
    device: torch.device


def trainable_state(
    model: nn.Module, local: list[nn.Parameter], optimizer: AdapterOptimizer, device: torch.device
) -> TrainableState:
    """Find the cuts of a sharded model's trained parameters.

    Args:
        model: sharded.
        local: the local shards of its trained parameters, in their order (`AdapterShards.local`).
        optimizer: over them.
        device: this rank's.
    """
    cuts, shards, by_name, is_writer = {}, set(), {}, True
    for (name, parameter), shard in zip(named_trainable_parameters(model), local, strict=True):
        cuts[name], index, first_replica = _shard_spec(parameter)
        shards.add(index)
        is_writer = is_writer and first_replica
        by_name[name] = shard
        assert tuple(shard.shape) == cuts[name].shard_shape(index), name
    assert len(shards) == 1, "all trained parameters lie on one mesh"
    return TrainableState(cuts, shards.pop(), is_writer, by_name, optimizer, device)


def _shard_spec(parameter: torch.Tensor) -> tuple[ShardSpec, int, bool]:
    """How it is cut, which part is this rank's, and whether this is the first rank to hold that part."""
    flat = get_flat_shard(parameter)
    if flat is not None:
        return ShardSpec(tuple(flat.shape), FLAT_DIM, flat.num_shards), flat.shard_index, flat.is_first_replica
    if not isinstance(parameter, DTensor):
        return ShardSpec(tuple(parameter.shape), 0, 1), 0, True
    mesh, spec_and_index, first = parameter.device_mesh, None, True
    for mesh_dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            assert spec_and_index is None, "FSDP2 cuts along one dimension"
            cut = ShardSpec(tuple(parameter.shape), placement.dim, mesh.size(mesh_dim))
            spec_and_index = cut, mesh.get_local_rank(mesh_dim)
        else:
            first = first and mesh.get_local_rank(mesh_dim) == 0
    assert spec_and_index is not None
    return *spec_and_index, first


def snapshot(state: TrainableState) -> dict[str, torch.Tensor]:
    """Copies on the CPU of this rank's shards, their moments, and its random states, by name in the file.

    Empty shards are left out.
    """
    tensors = {RNG_STATE_CPU: torch.get_rng_state()}
    if state.device.type == "cuda":
        tensors[RNG_STATE_CUDA] = torch.cuda.get_rng_state(state.device)
    if state.is_writer:
        for (name, parameter), moments in zip(state.local.items(), state.optimizer.optimizer_state.read(), strict=True):
            if parameter.numel():
                tensors[f"parameter/{name}"] = parameter.detach().to("cpu", copy=True)
                tensors |= {f"{kind}/{name}": values for kind, values in moments.items()}
    return tensors


def restore(state: TrainableState, manifest: Manifest, folder: Path) -> None:
    """Put a checkpoint's values into this rank's shards and moments, whatever number of ranks wrote it.

    Moments in as many bits as they were saved in, cut as they were saved, come back as they were. Else they go through
    fp32, and those in 8 bit are rounded again. The random states come back where the world has the size it had; else
    they are left as they are.
    """
    state.optimizer.steps = manifest.state["optimizer_steps"]
    with torch.no_grad(), SafetensorsReader() as reader:
        state.optimizer.optimizer_state.write(_saved_shards(state, manifest, folder, reader))
        _restore_random(state, manifest, folder, reader)


def _saved_shards(
    state: TrainableState, manifest: Manifest, folder: Path, reader: SafetensorsReader
) -> Iterator[dict[str, torch.Tensor]]:
    """Put back one parameter after the other, and give the moments of each."""
    bits, saved_bits = state.optimizer.optimizer_state.bits, manifest.optimizer_bits
    headers: dict[int, dict[str, TensorEntry]] = {}

    def saved(shard: int, name: str, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        if shard not in headers:
            headers[shard] = read_safetensors_header(folder / rank_file_name(shard))
        return {kind: reader.read(headers[shard][f"{kind}/{name}"]) for kind in kinds}

    for name, parameter in state.local.items():
        if not parameter.numel():
            yield {}
            continue
        cut, kinds = manifest.cuts[name], ("parameter", *state_tensor_names(saved_bits))
        if cut == state.cuts[name] and bits == saved_bits:
            tensors = saved(state.shard, name, kinds)
            parameter.copy_(tensors.pop("parameter"))
            yield tensors
            continue
        values = {kind: torch.empty(parameter.shape) for kind in ("parameter", *STATE_NAMES)}
        for shard, parts in groupby(copy_ops(cut, state.cuts[name], state.shard), key=lambda copy: copy.shard):
            saved_values = state_to_fp32(saved(shard, name, kinds))
            for part in parts:
                for kind, value in values.items():
                    part.target.of(value).copy_(part.source.of(saved_values[kind]))
        parameter.copy_(values.pop("parameter"))
        yield state_from_fp32(values, bits)


def _restore_random(state: TrainableState, manifest: Manifest, folder: Path, reader: SafetensorsReader) -> None:
    world_size = torch.distributed.get_world_size()
    if manifest.world_size != world_size:
        return
    header: Mapping[str, TensorEntry] = read_safetensors_header(folder / rank_file_name(torch.distributed.get_rank()))
    torch.set_rng_state(reader.read(header[RNG_STATE_CPU]))
    if state.device.type == "cuda" and RNG_STATE_CUDA in header:
        torch.cuda.set_rng_state(reader.read(header[RNG_STATE_CUDA]), state.device)
