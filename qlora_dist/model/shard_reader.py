"""From the files of a folder into shards, piece by piece, the next piece being read while one is put in its place."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qlora_dist.io.read_ahead import ReadAhead, ReadProgress, ReadRequest, read_chunks
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantizable import SourceMatrix
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quantize import dequantize_weight, quantize_chunks

_EXCHANGED_BYTES = 2**20  # at a time, of all replicas together: gloo keeps up to twenty times as much for itself
_ALIGNMENT = 8  # bytes, of parts: a multiple of every element


WriteShard = Callable[[int, torch.Tensor], None]
"""Keeps values: [n], of any type and device, as the elements of a shard from a first one on."""


@dataclass(frozen=True)
class LocalShard:
    """What a rank holds of a tensor, and which of the tensor's bytes it is."""

    local: torch.Tensor
    """Contiguous, on any device, of the model's type; on meta, if `put` keeps it elsewhere."""
    keys: tuple[str, ...]
    """Names of the tensors in the folder. Several lie one behind the other in the parameter, and have one type."""
    start: int
    """First byte, counted from the first of them on; of a 4-bit weight, in its byte vector."""
    put: WriteShard
    """Keeps its elements."""


class ShardReader:
    """The reads of a rank, known as a whole before the first one begins.

    Shards that have copies on other ranks are read by all these together, a part each, and exchanged: the ranks of
    `replicas` must be given the same shards. First the shards are to be filled, then the weights quantized, in the
    order in which they are given. Memory: the shards, two pieces, and the weight that is being quantized, packed.

    Args:
        folder: where the bytes are.
        shards: what to fill with them; `self.shards` has them in the order of the files.
        to_quantize: 16 or 32 bit weights that this rank reads as a whole.
        replicas: 1-D mesh of the ranks that hold the same shards, or None.
        device: where the ranks exchange and quantize.
        progress: called after each read.
    """

    def __init__(
        self,
        folder: ModelFolder,
        shards: Iterable[LocalShard],
        to_quantize: Sequence[SourceMatrix],
        replicas: DeviceMesh | None,
        device: torch.device,
        progress: Callable[[ReadProgress], None] | None = None,
    ) -> None:
        self.shards = sorted((s for s in shards if s.local.numel()), key=lambda shard: _file_position(folder, shard))
        self._folder, self._replicas, self._device = folder, replicas, device
        self._reader = SafetensorsReader()
        reads = [read for shard in self.shards for read in self._shard_reads(shard)]
        reads += [read for m in to_quantize for read in tensor_reads(self._reader, folder.entries[m.key], m.index)]
        self._read_ahead = ReadAhead(reads, progress)

    @property
    def bytes_read(self) -> int:
        """From the files, so far."""
        return self._reader.bytes_read

    def load_shards(self) -> None:
        """Fill all shards. A collective of the replicas."""
        for shard in self.shards:
            for start, nbytes, _ in self._parts(shard):
                data = next(self._read_ahead)
                if self._replicas is None:
                    self._write(shard, start, data)
                else:
                    self._exchange(shard, start, nbytes, data)

    def quantize_next(self, layout: NF4Layout, transposed: bool) -> torch.Tensor:
        """packed: uint8[layout.total_bytes] on the device, of the next weight of `to_quantize`."""
        return quantize_from_reads(self._read_ahead, layout, transposed, self._device)

    def read_dequantized(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """A whole 4-bit weight as `dtype` on the device, read now."""
        weight = self._folder.quantized[key]
        packed = torch.empty(weight.layout.total_bytes, dtype=torch.uint8)
        weight.read_range(self._reader, packed, 0)
        return dequantize_weight(packed.to(self._device), weight.layout, dtype)

    def _parts(self, shard: LocalShard) -> Iterator[tuple[int, int, int]]:
        """The pieces that are read of a shard: the first byte within it, and how many; and how many by this rank.

        Each of the replicas reads one contiguous part, all of them equally many pieces; the last parts may be shorter.
        """
        total, part_bytes = self._nbytes(shard), self._part_bytes(shard)
        own = self._replicas.get_local_rank() * part_bytes if self._replicas is not None else 0
        for start, nbytes in read_chunks(part_bytes):
            yield own + start, nbytes, max(0, min(nbytes, total - own - start))

    def _shard_reads(self, shard: LocalShard) -> Iterator[ReadRequest]:
        for start, _, count in self._parts(shard):
            yield ReadRequest(count, self._read_into(shard.keys, shard.start + start))

    def _read_into(self, keys: tuple[str, ...], start: int) -> Callable[[torch.Tensor], None]:
        sizes = [_nbytes(self._folder, key) for key in keys]
        begins = [0, *accumulate(sizes)]

        def read(out: torch.Tensor) -> None:
            done = 0
            while done < out.numel():
                index = bisect_right(begins, start + done) - 1
                first = start + done - begins[index]
                part = out[done : done + sizes[index] - first]
                if keys[index] in self._folder.quantized:
                    self._folder.quantized[keys[index]].read_range(self._reader, part, first)
                else:
                    self._reader.read_into(part, self._folder.entries[keys[index]], first)
                done += part.numel()

        return read

    def _exchange(self, shard: LocalShard, start: int, nbytes: int, data: torch.Tensor) -> None:
        """Put in its place what each of the replicas has read: uint8[at most nbytes] from `start` on by this one."""
        assert self._replicas is not None
        count, total, part_bytes = self._replicas.size(), self._nbytes(shard), self._part_bytes(shard)
        within = start - self._replicas.get_local_rank() * part_bytes
        for first, width in read_chunks(nbytes, max(_ALIGNMENT, _EXCHANGED_BYTES // count // _ALIGNMENT * _ALIGNMENT)):
            own_bytes = data[first : first + width].to(self._device)
            own_bytes = torch.nn.functional.pad(own_bytes, (0, width - own_bytes.numel()))
            for replica, replica_bytes in enumerate(all_gather_bytes(own_bytes, self._replicas).view(count, width)):
                position = replica * part_bytes + within + first
                self._write(shard, position, replica_bytes[: max(0, total - position)])

    def _write(self, shard: LocalShard, start: int, data: torch.Tensor) -> None:
        """Copy uint8[n] to where its first byte is byte `start` of the shard as it lies in the file."""
        values = data.view(self._dtype(shard))
        shard.put(start // values.itemsize, values)

    def _part_bytes(self, shard: LocalShard) -> int:
        nbytes = self._nbytes(shard)
        if self._replicas is None:
            return nbytes
        return -(-nbytes // self._replicas.size() // _ALIGNMENT) * _ALIGNMENT

    def _dtype(self, shard: LocalShard) -> torch.dtype:
        key = shard.keys[0]
        return torch.uint8 if key in self._folder.quantized else self._folder.entries[key].dtype

    def _nbytes(self, shard: LocalShard) -> int:
        return shard.local.numel() * self._dtype(shard).itemsize

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._read_ahead.__exit__(None, None, None)
        self._reader.close()


def all_gather_bytes(part: torch.Tensor, replicas: DeviceMesh) -> torch.Tensor:
    """uint8[n] of each of the replicas, one behind the other."""
    parts = torch.empty(part.numel() * replicas.size(), dtype=torch.uint8, device=part.device)
    dist.all_gather_single(parts, part, group=replicas.get_group())
    return parts


def tensor_reads(reader: SafetensorsReader, entry: TensorEntry, index: int | None = None) -> Iterator[ReadRequest]:
    """The reads of a whole tensor, or of one of the matrices of a three-dimensional one."""
    size = entry.nbytes if index is None else entry.nbytes // entry.shape[0]
    first = (index or 0) * size
    for start, nbytes in read_chunks(size):
        yield ReadRequest(nbytes, partial(reader.read_into, entry=entry, start=first + start))


def quantize_from_reads(ahead: ReadAhead, layout: NF4Layout, transposed: bool, device: torch.device) -> torch.Tensor:
    """packed: uint8[layout.total_bytes] on the device, of a weight whose `tensor_reads` are the next ones.

    One that lies transposed in the file is held whole.
    """
    dtype = getattr(torch, layout.dtype)
    flat: Iterator[torch.Tensor] = (next(ahead).view(dtype) for _ in read_chunks(layout.numel * dtype.itemsize))
    if transposed:
        rows, columns = layout.shape
        weight = torch.cat([piece.clone() for piece in flat])
        flat = iter([weight.view(columns, rows).T.contiguous().view(-1)])
    return quantize_chunks(flat, layout, device)


def _nbytes(folder: ModelFolder, key: str) -> int:
    return folder.quantized[key].layout.total_bytes if key in folder.quantized else folder.entries[key].nbytes


def _file_position(folder: ModelFolder, shard: LocalShard) -> tuple[Path, int]:
    key = shard.keys[0]
    quantized = folder.quantized.get(key)
    entry = quantized.parts[0][1] if quantized is not None else folder.entries[key]
    return entry.path, entry.start
