"""Bytes that one optimizer step communicates under FSDP2 with two meshes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from qlora_dist.plan.model_spec import FsdpUnit, FsdpUnitKind, ParameterSpec, count_distinct_units

_GATHERS: dict[FsdpUnitKind, int] = {
    "embedding": 1,  # frozen, so backward does not need it
    "shared_embedding": 1,  # stays gathered for the head
    "head": 1,  # its gradient is computed in forward
    "layer": 2,  # forward and backward
    "root": 1,  # the last norm, which stays gathered until backward
}
"""Number of gathers of a unit per micro-batch."""
_GRADIENT_BYTES = 4  # gradients are summed in fp32
_CONTROL_BYTES = 2 * 8  # summed loss and squared gradient norm, fp64


@dataclass(frozen=True)
class ShardCounts:
    """Numbers of ranks over which one copy of the base, and one of the adapters, is sharded."""

    world_size: int
    base_shards: int
    adapter_shards: int


def step_traffic(
    units: Iterable[FsdpUnit], shard_counts: ShardCounts, gradient_accumulation: int, compute_bytes: int
) -> dict[str, int]:
    """Return the bytes that one rank receives, by mesh dimension; in a ring it sends as many.

    `shard` is among the ranks that share a copy of the base (or, with `adapter: node`, of the adapters). `world` is
    among all ranks, and `replica` between copies of the adapters. `control` is loss and gradient norm. Dimensions
    without traffic are left out. Parameters are gathered for each micro-batch, gradients sent once.

    An all-gather of shards of s bytes over n ranks receives (n - 1) s bytes, and so does a reduce-scatter into shards
    of s bytes. A ring all-reduce of b bytes receives 2 b (n - 1) / n. FSDP2 shards by whole rows or columns, padded to
    the same number on every rank.
    """
    world, replicas = shard_counts.world_size, shard_counts.world_size // shard_counts.adapter_shards
    base_dim = "world" if shard_counts.base_shards == world else "shard"
    adapter_dim = "world" if replicas == 1 else "shard"
    traffic: Counter[str] = Counter()
    for unit, count in count_distinct_units(units):
        gathers = count * _GATHERS[unit.kind] * gradient_accumulation
        gradient = 0
        for parameter in unit.parameters:
            shards = shard_counts.adapter_shards if parameter.trained else shard_counts.base_shards
            elements = shard_elements(parameter, shards)
            element_bytes = 1 if parameter.is_quantized else compute_bytes
            dim = adapter_dim if parameter.trained else base_dim
            traffic[dim] += gathers * (shards - 1) * elements * element_bytes
            if parameter.trained:
                traffic[dim] += count * (shards - 1) * elements * _GRADIENT_BYTES
                gradient += elements * _GRADIENT_BYTES
        traffic["replica"] += count * (2 * gradient * (replicas - 1) // replicas)
    traffic["control"] = 2 * _CONTROL_BYTES * (world - 1) // world
    return {dim: nbytes for dim, nbytes in traffic.items() if nbytes}


def shard_elements(parameter: ParameterSpec, shards: int) -> int:
    """Return the elements of a rank's shard, padding included.

    Parameters are sharded along dim 0. An adapter's matrix that is wider than high (LoRA's A) is sharded along dim 1 if
    its columns divide among the shards.
    """
    size = parameter.shape[1 if is_column_sharded(parameter, shards) else 0]
    return parameter.numel // size * -(-size // shards)


def trained_shard_elements(unit: FsdpUnit, shards: int) -> int:
    """Return the elements of a rank's shards of a unit's trained parameters, padding included."""
    return sum(shard_elements(p, shards) for p in unit.parameters if p.trained)


def is_column_sharded(parameter: ParameterSpec, shards: int) -> bool:
    """Return whether a parameter is an adapter's matrix that is sharded along dim 1."""
    if not parameter.trained or parameter.always_row_sharded or len(parameter.shape) != 2:
        return False
    rows, columns = parameter.shape
    return columns > rows and columns % shards == 0
