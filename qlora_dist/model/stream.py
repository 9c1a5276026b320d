"""From the files of a folder into shards, piece by piece, the next piece being read while one is put in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qlora_dist.model.folder import ModelFolder
from qlora_dist.nf4.layout import NF4Layout
from qlora_dist.nf4.quantize import quantize_pieces
from qlora_dist.nf4.read_ahead import Read, ReadAhead, Reading, pieces
from qlora_dist.nf4.safetensors_file import Entry, Reader

_EXCHANGED_BYTES = 2**20  # at a time, of all replicas together: gloo keeps up to twenty times as much for itself
_ALIGNMENT = 8  # bytes, of parts: a multiple of every element


@dataclass(frozen=True)
class ShardInFolder:
    """What a rank holds of a tensor, and which of the tensor's bytes it is."""

    local: torch.Tensor
    """Contiguous, on any device, of the model's type."""
    key: str
    """Of the tensor in the folder."""
    start: int
    """First byte; of a 4-bit weight, in its byte vector."""


class Stream:
    """The reads of a rank, known as a whole before the first one begins.

    Shards that have copies on other ranks are read by all these together, a part each, and exchanged: the ranks of
    `replicas` must be given the same shards. First the shards are to be filled, then the weights quantized, in the
    order in which they are given. Memory: the shards, two pieces, and the weight that is being quantized, packed.

    Args:
        folder: where the bytes are.
        shards: what to fill with them; `self.shards` has them in the order of the files.
        to_quantize: 16 or 32 bit weights that this rank reads as a whole, by name.
        replicas: 1-D mesh of the ranks that hold the same shards, or None.
        device: where the ranks exchange and quantize.
        progress: called after each read.
    """

    def __init__(
        self,
        folder: ModelFolder,
        shards: Iterable[ShardInFolder],
        to_quantize: Sequence[str],
        replicas: DeviceMesh | None,
        device: torch.device,
        progress: Callable[[Reading], None] | None = None,
    ) -> None:
        self.shards = sorted((s for s in shards if s.local.numel()), key=lambda shard: _place(folder, shard))
        self._folder, self._replicas, self._device = folder, replicas, device
        self._reader = Reader()
        reads = [read for shard in self.shards for read in self._shard_reads(shard)]
        reads += [read for key in to_quantize for read in tensor_reads(self._reader, folder.entries[key])]
        self._ahead = ReadAhead(reads, progress)

    @property
    def bytes_read(self) -> int:
        """From the files, so far."""
        return self._reader.bytes_read

    def fill_shards(self) -> None:
        """Fill all shards. A collective of the replicas."""
        for shard in self.shards:
            for start, nbytes, _ in self._parts(shard):
                data = next(self._ahead)
                if self._replicas is None:
                    self._put(shard, start, data)
                else:
                    self._exchange(shard, start, nbytes, data)

    def quantize_next(self, layout: NF4Layout) -> torch.Tensor:
        """packed: uint8[layout.total_bytes] on the device, of the next weight of `to_quantize`."""
        return quantize_next(self._ahead, layout, self._device)

    def _parts(self, shard: ShardInFolder) -> Iterator[tuple[int, int, int]]:
        """The pieces that are read of a shard: the first byte within it, and how many; and how many by this rank.

        Each of the replicas reads one contiguous part, all of them equally many pieces; the last parts may be shorter.
        """
        total, part_bytes = self._nbytes(shard), self._part_bytes(shard)
        own = self._replicas.get_local_rank() * part_bytes if self._replicas is not None else 0
        for start, nbytes in pieces(part_bytes):
            yield own + start, nbytes, max(0, min(nbytes, total - own - start))

    def _shard_reads(self, shard: ShardInFolder) -> Iterator[Read]:
        for start, _, count in self._parts(shard):
            yield Read(count, self._read_into(shard.key, shard.start + start))

    def _read_into(self, key: str, start: int) -> Callable[[torch.Tensor], None]:
        if key in self._folder.quantized:
            return lambda out: self._folder.quantized[key].read_range(self._reader, out, start)
        return lambda out: self._reader.read_into(out, self._folder.entries[key], start)

    def _exchange(self, shard: ShardInFolder, start: int, nbytes: int, data: torch.Tensor) -> None:
        """Put in its place what each of the replicas has read: uint8[at most nbytes] from `start` on by this one."""
        assert self._replicas is not None
        count, total, part_bytes = self._replicas.size(), self._nbytes(shard), self._part_bytes(shard)
        within = start - self._replicas.get_local_rank() * part_bytes
        for first, width in pieces(nbytes, max(_ALIGNMENT, _EXCHANGED_BYTES // count // _ALIGNMENT * _ALIGNMENT)):
            mine = data[first : first + width].to(self._device)
            mine = torch.nn.functional.pad(mine, (0, width - mine.numel()))
            all_of_them = torch.empty(count * width, dtype=torch.uint8, device=self._device)
            dist.all_gather_into_tensor(all_of_them, mine, group=self._replicas.get_group())
            for replica, theirs in enumerate(all_of_them.view(count, width)):
                position = replica * part_bytes + within + first
                self._put(shard, position, theirs[: max(0, total - position)])

    def _put(self, shard: ShardInFolder, start: int, data: torch.Tensor) -> None:
        """Copy uint8[n] to where its first byte is byte `start` of the shard as it lies in the file."""
        values = data.view(self._dtype(shard))
        first = start // values.itemsize
        shard.local.view(-1)[first : first + values.numel()].copy_(values)

    def _part_bytes(self, shard: ShardInFolder) -> int:
        nbytes = self._nbytes(shard)
        if self._replicas is None:
            return nbytes
        return -(-nbytes // self._replicas.size() // _ALIGNMENT) * _ALIGNMENT

    def _dtype(self, shard: ShardInFolder) -> torch.dtype:
        return torch.uint8 if shard.key in self._folder.quantized else self._folder.entries[shard.key].dtype

    def _nbytes(self, shard: ShardInFolder) -> int:
        return shard.local.numel() * self._dtype(shard).itemsize

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._ahead.__exit__(None, None, None)
        self._reader.close()


def tensor_reads(reader: Reader, entry: Entry) -> Iterator[Read]:
    """The reads of a whole tensor."""
    for start, nbytes in pieces(entry.nbytes):
        yield Read(nbytes, lambda out, start=start: reader.read_into(out, entry, start))  # type: ignore[misc]


def quantize_next(ahead: ReadAhead, layout: NF4Layout, device: torch.device) -> torch.Tensor:
    """packed: uint8[layout.total_bytes] on the device, of a weight whose `tensor_reads` are the next ones."""
    dtype = getattr(torch, layout.dtype)
    count = len(list(pieces(layout.numel * dtype.itemsize)))
    return quantize_pieces((next(ahead).view(dtype) for _ in range(count)), layout, device)


def _place(folder: ModelFolder, shard: ShardInFolder) -> tuple[Path, int]:
    quantized = folder.quantized.get(shard.key)
    entry = quantized.parts[0][1] if quantized is not None else folder.entries[shard.key]
    return entry.path, entry.start
