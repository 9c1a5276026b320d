"""Weight in a published format in a folder, read by bytes of its vector or by rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qlora_dist.formats.published_layout import PublishedLayout
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry
from qlora_dist.nf4.nf4_layout import BLOCK_SIZES
from qlora_dist.runtime.byte_sizes import align_bytes

_DECODED_PER_CHUNK = 2**22
"""Approximate number of weights in a chunk. A smaller one costs less memory for the dequantized values."""


@dataclass(frozen=True)
class PublishedWeightEntry:
    """Weight in a published format in a folder."""

    layout: PublishedLayout
    parts: tuple[TensorEntry, ...]
    """Tensors in the files, in the order of `layout.parts`."""

    @property
    def first_tensor(self) -> TensorEntry:
        """The codes' tensor."""
        return self.parts[0]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in the files."""
        return sum(part.nbytes for part in self.parts)

    def read_range(self, reader: SafetensorsReader, out: torch.Tensor, start: int) -> None:
        """Fill `out: uint8[n]` (CPU) with bytes start .. start+n of the vector. No other bytes are read."""
        stop = start + out.numel()
        out.zero_()  # the gaps between the parts
        for span, entry in zip(self.layout.spans, self.parts, strict=True):
            lo, hi = max(span.start, start), min(span.stop, stop)
            if lo < hi:
                reader.read_into(out[lo - start : hi - start], entry, lo - span.start)

    def row_chunks(self) -> Iterator[tuple[int, int]]:
        """Yield the first row of each chunk, and one past its last.

        A chunk but the last has a number of weights that every 4-bit block size divides.
        """
        rows, columns = self.layout.shape
        unit = math.lcm(self.layout.row_unit, max(BLOCK_SIZES) // math.gcd(columns, max(BLOCK_SIZES)))
        step = unit * max(1, _DECODED_PER_CHUNK // (columns * unit))
        for first in range(0, rows, step):
            yield first, min(first + step, rows)

    def rows_nbytes(self, first: int, stop: int) -> int:
        """Return the length of the vector that `read_rows` fills."""
        return sum(align_bytes(nbytes) for *_, nbytes in self._row_spans(first, stop))

    def read_rows(self, reader: SafetensorsReader, out: torch.Tensor, first: int, stop: int) -> None:
        """Fill `out: uint8[rows_nbytes(first, stop)]` (CPU) with the bytes of some rows, part after part.

        Each part begins at a multiple of 16 bytes.
        """
        position = 0
        for entry, start, nbytes in self._row_spans(first, stop):
            reader.read_into(out[position : position + nbytes], entry, start)
            position += align_bytes(nbytes)

    def decode_rows(self, data: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        """Return the rows first .. stop, [rows, in_features] in the layout's type.

        `data`, uint8 on any device, is what `read_rows` has filled.
        """
        parts, position = [], 0
        for part in self.layout.parts:
            rows = self.layout.part_rows(part, first, stop)
            shape = (rows.stop - rows.start, *part.shape[1:]) if part.shape else ()
            nbytes = part.dtype.itemsize * math.prod(shape)
            parts.append(data[position : position + nbytes].view(part.dtype).view(shape))
            position += align_bytes(nbytes)
        return self.layout.decode(parts)

    def _row_spans(self, first: int, stop: int) -> Iterator[tuple[TensorEntry, int, int]]:
        """Yield each part with the first byte of these rows in it, and their length in bytes."""
        for part, entry in zip(self.layout.parts, self.parts, strict=True):
            rows = self.layout.part_rows(part, first, stop)
            row_bytes = part.nbytes // part.shape[0] if part.shape else part.nbytes
            yield entry, rows.start * row_bytes, (rows.stop - rows.start) * row_bytes
