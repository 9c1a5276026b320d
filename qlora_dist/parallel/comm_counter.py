"""A counter of the bytes that collectives communicate, by mesh dimension."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist


class CommCounter:
    """Bytes that this rank has received, by collective and mesh dimension. A ring sends as many as it receives."""

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str]] = Counter()

    def add(self, collective: str, dim: str, nbytes: int) -> None:
        """Count one collective."""
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
