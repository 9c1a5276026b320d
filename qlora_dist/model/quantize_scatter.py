"""Quantization of a model while it is loaded.

One owner rank reads and quantizes each matrix, in turn, and scatters it to the ranks that hold its shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qlora_dist.model.quantizable import SourceMatrix
from qlora_dist.model.shard_reader import ShardReader, WriteShard, all_gather_bytes
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.shard_view import full_shape, local_tensor_and_offset


@dataclass(frozen=True, kw_only=True)
class ScatteredMatrix:
    """Matrix to be quantized, and its place in a parameter's byte vector."""

    parameter: torch.Tensor
    """uint8[n], sharded or not."""
    offset: int
    """First byte in the parameter."""
    layout: NF4Layout
    matrix: SourceMatrix
    write: WriteShard
    """Function that writes bytes of this rank's shard."""

    def shard_range(self, shard: int, shards: int) -> tuple[int, int]:
        """Return the first byte of the matrix in a shard, and one past the last; equal if there are none."""
        shard_bytes = -(-full_shape(self.parameter).numel() // shards)
        first = min(max(shard * shard_bytes - self.offset, 0), self.layout.total_bytes)
        last = min(max((shard + 1) * shard_bytes - self.offset, 0), self.layout.total_bytes)
        return first, last

    def sent_range(self, rank: int, shards: int, replicas: int) -> tuple[int, int]:
        """Return the bytes that the owner sends to a rank: its share of a shard that the replicas hold together."""
        first, last = self.shard_range(rank % shards, shards)  # neighbouring ranks share a replica of the base
        part_bytes = -(-(last - first) // replicas)
        replica = rank // shards
        return min(first + replica * part_bytes, last), min(first + (replica + 1) * part_bytes, last)


def scattered_matrices(
    parameter: torch.Tensor, layout: NF4Layout, matrices: Sequence[SourceMatrix], write: WriteShard
) -> list[ScatteredMatrix]:
    """Return the matrices of a parameter, which lie in it one after the other."""
    return [
        ScatteredMatrix(
            parameter=parameter, offset=index * layout.total_bytes, layout=layout, matrix=matrix, write=write
        )
        for index, matrix in enumerate(matrices)
    ]


def quantize_and_scatter(
    matrices: Sequence[ScatteredMatrix], reader: ShardReader, replicas: DeviceMesh | None, device: torch.device
) -> None:
    """Read, quantize and scatter all matrices. A collective of the default process group.

    Each rank owns every world_size-th of `matrices`, which must be the next ones of its reader. In a round each rank
    reads and quantizes one matrix. One all-to-all then sends every rank its share of all of them. Ranks that hold the
    same shard receive a part of it each, and exchange these parts.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    num_replicas = replicas.size() if replicas is not None else 1
    shards = world_size // num_replicas
    for begin in range(0, len(matrices), world_size):
        round_matrices = matrices[begin : begin + world_size]
        sent, sent_sizes = torch.empty(0, dtype=torch.uint8, device=device), [0] * world_size
        if rank < len(round_matrices):
            own = round_matrices[rank]
            sent = reader.quantize_next(own.layout, own.matrix)
            parts = [own.sent_range(r, shards, num_replicas) for r in range(world_size)]
            sent_sizes = [last - first for first, last in parts]
            if num_replicas > 1:
                sent = torch.cat([sent[first:last] for first, last in parts])
        ranges = [matrix.sent_range(rank, shards, num_replicas) for matrix in round_matrices]
        sizes = [last - first for first, last in ranges]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        dist.all_to_all_single(received, sent, sizes + [0] * (world_size - len(round_matrices)), sent_sizes)
        del sent
        for matrix, part in zip(round_matrices, received.split(sizes), strict=True):
            first, last = matrix.shard_range(rank % shards, shards)
            if first == last:
                continue
            if replicas is not None:
                padding = -(-(last - first) // num_replicas) - part.numel()
                part = all_gather_bytes(torch.nn.functional.pad(part, (0, padding)), replicas)[: last - first]
            _, shard_offset = local_tensor_and_offset(matrix.parameter)
            matrix.write(matrix.offset + first - shard_offset[0], part)
