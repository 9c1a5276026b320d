"""The device meshes of the frozen base and of the adapters, and a counter of the bytes that go over them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qlora_dist.config.sections import ParallelConfig
from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import RankInfo


@dataclass(frozen=True)
class MeshSizes:
    """Numbers of shards of base and adapters.

    Neighbouring ranks share a copy of the base. Rank r holds shard `r % base_shards` of the base and shard
    `r % adapter_shards` of the adapters.
    """

    world_size: int
    base_shards: int
    adapter_shards: int

    @property
    def adapter_replicas(self) -> int:
        """Number of copies of the adapters; all-reducing the gradients keeps them equal."""
        return self.world_size // self.adapter_shards


@dataclass(frozen=True)
class Meshes:
    """Device meshes. Their dimensions are called `shard` (within a copy of the base), `world` and `replica`."""

    sizes: MeshSizes
    base: DeviceMesh
    """1-D over the ranks that share a copy of the base."""
    base_replicas: DeviceMesh | None
    """1-D over the ranks that hold the same shard of the base; None if there is one copy."""
    adapter: DeviceMesh
    """1-D over the ranks that share the adapters, or 2-D (replica, shard)."""

    @property
    def shares_group(self) -> bool:
        """Whether base and adapters share one mesh, so that a layer is gathered in one collective."""
        return self.adapter is self.base

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        name = self.base.device_type
        return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)

    @property
    def adapter_group(self) -> dist.ProcessGroup:
        """Group of the ranks that share a copy of the adapters."""
        return self.adapter.get_group(self.adapter.ndim - 1)

    @property
    def is_first_adapter_replica(self) -> bool:
        """Whether no rank before this one holds the same shard of the adapters."""
        return self.adapter.ndim == 1 or self.adapter.get_local_rank(0) == 0


class CommCounter:
    """Bytes that this rank has received, by collective and mesh dimension. A ring sends as many as it receives."""

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str]] = Counter()

    def add(self, collective: str, dim: str, nbytes: int) -> None:
        self.bytes[collective, dim] += nbytes

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """All-reduce over the world in place, counted as control traffic."""
        world_size = dist.get_world_size()
        if world_size > 1:
            dist.all_reduce(tensor, op)
            self.add("all_reduce", "control", 2 * tensor.nbytes * (world_size - 1) // world_size)
        return tensor

    def take(self) -> dict[str, int]:
        """Return the bytes by mesh dimension since the last call, and reset the counter."""
        by_dim: Counter[str] = Counter()
        for (_, dim), nbytes in self.bytes.items():
            by_dim[dim] += nbytes
        self.bytes.clear()
        return dict(by_dim)


def mesh_sizes(config: ParallelConfig, ranks: RankInfo) -> MeshSizes:
    """Return the sizes of the meshes. A mesh that does not divide the world, or unequal nodes, are a `UserError`."""
    world, node = ranks.world_size, ranks.local_world_size
    by_node = {"node", "paged"} & {config.base, config.adapter}
    if by_node and world % node:
        raise UserError(f"parallel: {world} ranks are not a multiple of the {node} on this node; start equal nodes")
    named = {"replicate": 1, "node": node, "paged": node, "world": world}
    base = config.base if isinstance(config.base, int) else named[config.base]
    if world % base:
        divisors = [str(n) for n in range(1, world + 1) if world % n == 0]
        choices = " or ".join(filter(None, [", ".join(divisors[:-1]), divisors[-1]]))
        raise UserError(f"parallel.base: {base} does not divide the world of {world} ranks; use {choices}")
    return MeshSizes(world, base, named[config.adapter])


def build_meshes(sizes: MeshSizes, device_type: str, *, separate_groups: bool = False) -> Meshes:
    """Build the meshes and their process groups. All ranks call this.

    With `separate_groups`, base and adapters have a group each, even if the same ranks share both.
    """
    world = init_device_mesh(device_type, (sizes.world_size,), mesh_dim_names=("world",))
    if sizes.base_shards == sizes.world_size:
        base, base_replicas = world, None
    else:
        replica_mesh = _replica_and_shard(sizes.world_size, sizes.base_shards, device_type)
        base, base_replicas = replica_mesh["shard"], replica_mesh["replica"]
    if sizes.adapter_replicas > 1:
        adapter = _replica_and_shard(sizes.world_size, sizes.adapter_shards, device_type)
    elif separate_groups and base is world:
        group = dist.new_group(list(range(sizes.world_size)))
        adapter = DeviceMesh.from_group(group, device_type, mesh_dim_names=("world",))
    else:
        adapter = world
    return Meshes(sizes, base, base_replicas, adapter)


def _replica_and_shard(world_size: int, shards: int, device_type: str) -> DeviceMesh:
    shape = (world_size // shards, shards)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replica", "shard"))
