"""Quantizing a model on its way to its ranks: they take turns to own a matrix, and deal it out."""

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


@dataclass(frozen=True)
class ScatteredMatrix:
    """A matrix that is to be quantized, and its place in a parameter's byte vector."""

    parameter: torch.Tensor
    """uint8[n], sharded or not."""
    start: int
    layout: NF4Layout
    matrix: SourceMatrix
    put: WriteShard
    """Keeps bytes of this rank's shard."""

    def span(self, shard: int, shards: int) -> tuple[int, int]:
        """The bytes of the matrix that lie in a shard: first, and one past the last; equal where there are none."""
        shard_bytes = -(-full_shape(self.parameter).numel() // shards)
        first = min(max(shard * shard_bytes - self.start, 0), self.layout.total_bytes)
        last = min(max((shard + 1) * shard_bytes - self.start, 0), self.layout.total_bytes)
        return first, last

    def part(self, rank: int, shards: int, replicas: int) -> tuple[int, int]:
        """Of a rank's span, what it is sent: the whole, or one part of it if others hold the same shard."""
        first, last = self.span(rank % shards, shards)  # neighbours share a copy of the base
        part_bytes = -(-(last - first) // replicas)
        copy = rank // shards
        return min(first + copy * part_bytes, last), min(first + (copy + 1) * part_bytes, last)


def scattered_matrices(
    parameter: torch.Tensor, layout: NF4Layout, matrices: Sequence[SourceMatrix], write: WriteShard
) -> list[ScatteredMatrix]:
    """The pieces of a parameter, one behind the other."""
    return [
        ScatteredMatrix(parameter, i * layout.total_bytes, layout, matrix, write) for i, matrix in enumerate(matrices)
    ]


def quantize_and_scatter(
    matrices: Sequence[ScatteredMatrix], stream: ShardReader, replicas: DeviceMesh | None, device: torch.device
) -> None:
    """Read, quantize and deal out all pieces. Called on all ranks of the default process group.

    A rank's next pieces, every world_size-th of `matrices`, are the next ones of its stream.

    In a round each rank owns one piece, which it alone reads; one all-to-all gives every rank its share of all of
    them. Ranks that hold the same shard are given a part of it each and exchange those.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    num_replicas = replicas.size() if replicas is not None else 1
    shards = world_size // num_replicas
    for begin in range(0, len(matrices), world_size):
        round_matrices = matrices[begin : begin + world_size]
        sent, sent_sizes = torch.empty(0, dtype=torch.uint8, device=device), [0] * world_size
        if rank < len(round_matrices):
            sent = stream.quantize_next(round_matrices[rank].layout, round_matrices[rank].matrix.transposed)
            parts = [round_matrices[rank].part(r, shards, num_replicas) for r in range(world_size)]
            sent_sizes = [last - first for first, last in parts]
            if num_replicas > 1:
                sent = torch.cat([sent[first:last] for first, last in parts])
        sizes = [last - first for first, last in (piece.part(rank, shards, num_replicas) for piece in round_matrices)]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        dist.all_to_all_single(received, sent, sizes + [0] * (world_size - len(round_matrices)), sent_sizes)
        del sent
        for piece, part in zip(round_matrices, received.split(sizes), strict=True):
            first, last = piece.span(rank % shards, shards)
            if first == last:
                continue
            if replicas is not None:
                padding = -(-(last - first) // num_replicas) - part.numel()
                part = all_gather_bytes(torch.nn.functional.pad(part, (0, padding)), replicas)[: last - first]
            _, offset = local_tensor_and_offset(piece.parameter)
            piece.put(piece.start + first - offset[0], part)
