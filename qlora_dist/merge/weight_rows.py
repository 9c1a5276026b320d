"""Chunks of a matrix's rows in fp32, read from 16 bit, 4 bit or a published format."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.io.safetensors_file import SafetensorsReader
from qlora_dist.merge.merge_plan import MatrixMerge
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.nf4.nf4_layout import BLOCK_SIZES, NF4Layout
from qlora_dist.nf4.quantize import dequantize_rows, dequantize_weight, quantize_chunks

_WEIGHTS_PER_CHUNK = 2**20
"""Approximate number of weights in a chunk, which has at least one row. Larger chunks exceed the processor's caches,
and the system allocates their memory anew each time."""

WeightRows = Iterator[tuple[int, torch.Tensor]]
"""Iterator of the index of a chunk's first row and its rows, fp32[n, in_features]."""


def base_weight_rows(part: MatrixMerge, folder: ModelFolder, reader: SafetensorsReader) -> WeightRows:
    """Yield the rows of the base's matrix in the folder."""
    if part.matrix.name in folder.quantized:
        return dequantized_weight_rows(packed_weight(part, folder, reader), part.layout)
    if part.matrix.name in folder.published:
        return _published_weight_rows(folder.published[part.matrix.name], part.layout, reader)
    return _file_weight_rows(part, folder, reader)


def training_weight_rows(part: MatrixMerge, folder: ModelFolder, reader: SafetensorsReader) -> WeightRows:
    """Yield the rows that the adapter was trained on, quantized if the run quantized them."""
    if part.trained_in_4bit:
        packed, published = packed_weight(part, folder, reader), folder.published.get(part.matrix.name)
        return dequantized_weight_rows(packed, part.layout, 1 if published is None else published.layout.row_unit)
    return base_weight_rows(part, folder, reader)


def packed_weight(part: MatrixMerge, folder: ModelFolder, reader: SafetensorsReader) -> torch.Tensor:
    """Return uint8[layout.total_bytes], read from a 4-bit folder or quantized from another one."""
    if part.matrix.name in folder.quantized:
        packed = torch.empty(part.layout.total_bytes, dtype=torch.uint8)
        folder.quantized[part.matrix.name].read_range(reader, packed, 0)
        return packed
    return quantize_weight_rows((rows for _, rows in base_weight_rows(part, folder, reader)), part.layout)


def quantize_weight_rows(rows: Iterator[torch.Tensor], layout: NF4Layout) -> torch.Tensor:
    """Quantize chunks of rows to uint8[layout.total_bytes]. They are rounded to the layout's type first."""
    dtype = getattr(torch, layout.dtype)
    return quantize_chunks((chunk.to(dtype).flatten() for chunk in rows), layout, torch.device("cpu"))


def dequantized_weight_rows(packed: torch.Tensor, layout: NF4Layout, row_unit: int = 1) -> WeightRows:
    """Yield the rows that a 4-bit byte vector encodes, in chunks of a multiple of `row_unit` rows."""
    if layout.shape[1] % layout.block_size:  # rows end within blocks; such matrices are small
        whole = dequantize_weight(packed, layout, torch.float32)
        for first, stop in _row_ranges(layout, row_unit):
            yield first, whole[first:stop]
        return
    for first, stop in _row_ranges(layout, row_unit):
        yield first, dequantize_rows(packed, layout, torch.arange(first, stop), torch.float32)


def _published_weight_rows(entry: PublishedWeightEntry, layout: NF4Layout, reader: SafetensorsReader) -> WeightRows:
    for first, stop in _row_ranges(layout, entry.layout.row_unit):
        data = torch.empty(entry.rows_nbytes(first, stop), dtype=torch.uint8)
        entry.read_rows(reader, data, first, stop)
        yield first, entry.decode_rows(data, first, stop).float()


def _file_weight_rows(part: MatrixMerge, folder: ModelFolder, reader: SafetensorsReader) -> WeightRows:
    entry, (rows, columns) = folder.entries[part.matrix.key], part.layout.shape
    size = entry.dtype.itemsize
    byte_offset = (part.matrix.index or 0) * rows * columns * size
    if part.matrix.transposed:  # it is held as a whole
        whole = torch.empty(columns, rows, dtype=entry.dtype)
        reader.read_into(whole, entry, byte_offset)
        for first, stop in _row_ranges(part.layout):
            yield first, whole[:, first:stop].T.float()
        return
    for first, stop in _row_ranges(part.layout):
        chunk = torch.empty(stop - first, columns, dtype=entry.dtype)
        reader.read_into(chunk, entry, byte_offset + first * columns * size)
        yield first, chunk.float()


def _row_ranges(layout: NF4Layout, row_unit: int = 1) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that are whole blocks of every size and multiples of `row_unit`, except for the last one."""
    rows, columns = layout.shape
    unit = math.lcm(row_unit, max(BLOCK_SIZES) // math.gcd(columns, max(BLOCK_SIZES)))
    step = unit * -(-max(1, _WEIGHTS_PER_CHUNK // columns) // unit)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
