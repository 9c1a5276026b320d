"""Reads of a folder's files into a rank's shards, in chunks. The next chunk is read while one is written."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qlora_dist.errors import UserError
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.io.read_ahead import ReadAhead, ReadProgress, ReadRequest, read_chunks
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry
from qlora_dist.layers.dequantize import dequantize
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantizable import SourceMatrix
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quantize import has_finite_scales, quantize_chunks

_EXCHANGED_BYTES = 2**20  # per exchange of all replicas: gloo allocates up to twenty times as much
_ALIGNMENT = 8  # bytes of a part: a multiple of every element size


WriteShard = Callable[[int, torch.Tensor], None]
"""Function that writes values, [n] of any type and device, to a shard's elements from the given index on."""


@dataclass(frozen=True)
class LocalShard:
    """Shard of a tensor on this rank, and its bytes in the folder."""

    local: torch.Tensor
    """Contiguous tensor of the model's type, on any device; on meta if `write` stores the values elsewhere."""
    keys: tuple[str, ...]
    """Names of the tensors in the folder. The parameter concatenates them; they have one type."""
    start: int
    """First byte in the concatenated tensors, or in the byte vectors of quantized weights."""
    write: WriteShard
    """Function that writes the shard's elements."""


class ShardReader:
    """Reads of a rank, all planned before the first one begins.

    The ranks of `replicas` hold the same shards. Each of them reads a part of every shard, and they exchange the parts.
    Call `load_shards` first, then `quantize_next` for each weight in the given order. Memory holds the shards, two
    chunks, and the packed weight that is being quantized.

    `self.shards` has the shards in the order of the files. `to_quantize` are weights that are not in 4 bit, which this
    rank reads as a whole. `device` is the place of exchanges and quantization. `progress` is called after each read.
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
        self.shards = sorted(
            (s for s in shards if s.local.numel()), key=lambda shard: folder.file_position(shard.keys[0])
        )
        self._folder, self._replicas, self._device = folder, replicas, device
        self._reader = SafetensorsReader()
        reads = [read for shard in self.shards for read in self._shard_reads(shard)]
        reads += [read for m in to_quantize for read in matrix_reads(self._reader, folder, m)]
        self._read_ahead = ReadAhead(reads, progress)

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    def load_shards(self) -> None:
        """Load all shards. A collective of the replicas."""
        for shard in self.shards:
            for start, nbytes, _ in self._parts(shard):
                data = next(self._read_ahead)
                if self._replicas is None:
                    self._write(shard, start, data)
                else:
                    self._exchange(shard, start, nbytes, data)

    def quantize_next(self, layout: NF4Layout, matrix: SourceMatrix) -> torch.Tensor:
        """Return uint8[layout.total_bytes] on the device: the next weight of `to_quantize`, packed."""
        return quantize_from_reads(self._read_ahead, layout, self._device, self._folder, matrix)

    def read_dequantized(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """Read a whole quantized weight and return it as `dtype` on the device."""
        weight = self._folder.packed(key)
        assert weight is not None, f"{key} is not quantized"
        vector = torch.empty(weight.layout.total_bytes, dtype=torch.uint8)
        weight.read_range(self._reader, vector, 0)
        return dequantize(vector.to(self._device), weight.layout, dtype)

    def _parts(self, shard: LocalShard) -> Iterator[tuple[int, int, int]]:
        """Yield the chunks of this rank's part of a shard: first byte in the shard, length, bytes that are read.

        Each replica has one contiguous part, and all parts have equally many chunks. The last parts may hold fewer
        bytes, so less than a chunk's length is read.
        """
        total, part_bytes = self._nbytes(shard), self._part_bytes(shard)
        own = self._replicas.get_local_rank() * part_bytes if self._replicas is not None else 0
        for start, nbytes in read_chunks(part_bytes):
            yield own + start, nbytes, max(0, min(nbytes, total - own - start))

    def _shard_reads(self, shard: LocalShard) -> Iterator[ReadRequest]:
        for start, _, count in self._parts(shard):
            yield ReadRequest(count, self._read_into(shard.keys, shard.start + start))

    def _read_into(self, keys: tuple[str, ...], start: int) -> Callable[[torch.Tensor], None]:
        sizes = [self._folder.nbytes(key) for key in keys]
        begins = [0, *accumulate(sizes)]

        def read(out: torch.Tensor) -> None:
            done = 0
            while done < out.numel():
                index = bisect_right(begins, start + done) - 1
                first = start + done - begins[index]
                part = out[done : done + sizes[index] - first]
                self._folder.read_range(keys[index], self._reader, part, first)
                done += part.numel()

        return read

    def _exchange(self, shard: LocalShard, start: int, nbytes: int, data: torch.Tensor) -> None:
        """Write the chunks that the replicas have read; this rank's is uint8[at most nbytes] from `start` on."""
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
        values = data.view(self._dtype(shard))
        shard.write(start // values.itemsize, values)

    def _part_bytes(self, shard: LocalShard) -> int:
        nbytes = self._nbytes(shard)
        if self._replicas is None:
            return nbytes
        return -(-nbytes // self._replicas.size() // _ALIGNMENT) * _ALIGNMENT

    def _dtype(self, shard: LocalShard) -> torch.dtype:
        key = shard.keys[0]
        return torch.uint8 if self._folder.packed(key) is not None else self._folder.entries[key].dtype

    def _nbytes(self, shard: LocalShard) -> int:
        return shard.local.numel() * self._dtype(shard).itemsize

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._read_ahead.__exit__(None, None, None)
        self._reader.close()


def all_gather_bytes(part: torch.Tensor, replicas: DeviceMesh) -> torch.Tensor:
    """Return the uint8[n] of all replicas, concatenated."""
    parts = torch.empty(part.numel() * replicas.size(), dtype=torch.uint8, device=part.device)
    dist.all_gather_single(parts, part, group=replicas.get_group())
    return parts


def tensor_reads(reader: SafetensorsReader, entry: TensorEntry, index: int | None = None) -> Iterator[ReadRequest]:
    """Yield the reads of a whole tensor, or of one matrix of a three-dimensional tensor."""
    size = entry.nbytes if index is None else entry.nbytes // entry.shape[0]
    first = (index or 0) * size
    for start, nbytes in read_chunks(size):
        yield ReadRequest(nbytes, partial(reader.read_into, entry=entry, start=first + start))


def matrix_reads(reader: SafetensorsReader, folder: ModelFolder, matrix: SourceMatrix) -> Iterator[ReadRequest]:
    """Yield the reads of a matrix that is not in 4 bit."""
    published = folder.published.get(matrix.name)
    if published is not None:
        yield from published_reads(reader, published)
    else:
        yield from tensor_reads(reader, folder.entries[matrix.key], matrix.index)


def published_reads(reader: SafetensorsReader, entry: PublishedWeightEntry) -> Iterator[ReadRequest]:
    """Yield the reads of a weight in a published format, one for each of its `row_chunks`."""
    for first, stop in entry.row_chunks():
        yield ReadRequest(
            entry.rows_nbytes(first, stop), partial(_read_published_rows, reader, entry, first=first, stop=stop)
        )


def _read_published_rows(
    reader: SafetensorsReader, entry: PublishedWeightEntry, out: torch.Tensor, first: int, stop: int
) -> None:
    entry.read_rows(reader, out, first, stop)


def decode_from_reads(ahead: ReadAhead, entry: PublishedWeightEntry, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield the rows of a weight whose `published_reads` are next in `ahead`, [rows, in_features] on the device."""
    for first, stop in entry.row_chunks():
        yield entry.decode_rows(next(ahead).to(device), first, stop)


def quantize_from_reads(
    ahead: ReadAhead, layout: NF4Layout, device: torch.device, folder: ModelFolder, matrix: SourceMatrix
) -> torch.Tensor:
    """Return uint8[layout.total_bytes] on the device: the packed weight whose `matrix_reads` are next in `ahead`.

    A weight that lies transposed in the file is held as a whole.

    Raises:
        UserError: a value is not finite.
    """
    published = folder.published.get(matrix.name)
    if published is not None:
        flat: Iterator[torch.Tensor] = (rows.flatten() for rows in decode_from_reads(ahead, published, device))
    else:
        dtype = getattr(torch, layout.dtype)
        flat = (next(ahead).view(dtype) for _ in read_chunks(layout.numel * dtype.itemsize))
    if published is None and matrix.transposed:
        rows, columns = layout.shape
        weight = torch.cat([piece.clone() for piece in flat])
        flat = iter([weight.view(columns, rows).T.contiguous().view(-1)])
    packed = quantize_chunks(flat, layout, device)
    if not has_finite_scales(packed, layout):
        raise UserError(
            f"{folder.path}: {matrix.name} holds values that are not finite; get the folder anew", local_only=True
        )
    return packed
