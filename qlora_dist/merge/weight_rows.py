"""The weights of a matrix in fp32, some rows at a time, from 16 bit or from 4."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from qlora_dist.io.safetensors_file import SafetensorsReader
from qlora_dist.merge.merge_plan import MatrixMerge
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.nf4.nf4_layout import BLOCK_SIZES, NF4Layout
from qlora_dist.nf4.quantize import dequantize_rows, dequantize_weight, quantize_chunks

_WEIGHTS_PER_CHUNK = 2**20
"""At a time, about; a row at least. Larger ones leave the processor's caches, and their memory comes anew each time."""

WeightRows = Iterator[tuple[int, torch.Tensor]]
"""Number of the first row, and fp32[n, in_features]."""


def base_weight_rows(part: MatrixMerge, folder: ModelFolder, reader: SafetensorsReader) -> WeightRows:
    """As they lie in the folder."""
    if part.matrix.name in folder.quantized:
        return dequantized_weight_rows(packed_weight(part, folder, reader), part.layout)
    return _file_weight_rows(part, folder, reader)


def training_weight_rows(part: MatrixMerge, folder: ModelFolder, reader: SafetensorsReader) -> WeightRows:
    """As the adapter saw them: in 4 bit, if the run had them so."""
    if part.trained_in_4bit:
        return dequantized_weight_rows(packed_weight(part, folder, reader), part.layout)
    return _file_weight_rows(part, folder, reader)


def packed_weight(part: MatrixMerge, folder: ModelFolder, reader: SafetensorsReader) -> torch.Tensor:
    """packed: uint8[layout.total_bytes], read or made."""
    if part.matrix.name in folder.quantized:
        packed = torch.empty(part.layout.total_bytes, dtype=torch.uint8)
        folder.quantized[part.matrix.name].read_range(reader, packed, 0)
        return packed
    return quantize_weight_rows((rows for _, rows in _file_weight_rows(part, folder, reader)), part.layout)


def quantize_weight_rows(rows: Iterator[torch.Tensor], layout: NF4Layout) -> torch.Tensor:
    """packed: uint8[layout.total_bytes] of rows that come in these pieces; rounded to the layout's type first."""
    dtype = getattr(torch, layout.dtype)
    return quantize_chunks((chunk.to(dtype).flatten() for chunk in rows), layout, torch.device("cpu"))


def dequantized_weight_rows(packed: torch.Tensor, layout: NF4Layout) -> WeightRows:
    """The rows that the bytes stand for."""
    if layout.shape[1] % layout.block_size:  # a row ends within a block; such matrices are small
        whole = dequantize_weight(packed, layout, torch.float32)
        for first, stop in _row_ranges(layout):
            yield first, whole[first:stop]
        return
    for first, stop in _row_ranges(layout):
        yield first, dequantize_rows(packed, layout, torch.arange(first, stop), torch.float32)


def _file_weight_rows(part: MatrixMerge, folder: ModelFolder, reader: SafetensorsReader) -> WeightRows:
    entry, (rows, columns) = folder.entries[part.matrix.key], part.layout.shape
    size = entry.dtype.itemsize
    byte_offset = (part.matrix.index or 0) * rows * columns * size
    if part.matrix.transposed:  # it is held whole
        whole = torch.empty(columns, rows, dtype=entry.dtype)
        reader.read_into(whole, entry, byte_offset)
        for first, stop in _row_ranges(part.layout):
            yield first, whole[:, first:stop].T.float()
        return
    for first, stop in _row_ranges(part.layout):
        chunk = torch.empty(stop - first, columns, dtype=entry.dtype)
        reader.read_into(chunk, entry, byte_offset + first * columns * size)
        yield first, chunk.float()


def _row_ranges(layout: NF4Layout) -> Iterator[tuple[int, int]]:
    """Rows that make whole blocks of every size, but for the last ones."""
    rows, columns = layout.shape
    unit = max(BLOCK_SIZES) // math.gcd(columns, max(BLOCK_SIZES))
    step = unit * -(-max(1, _WEIGHTS_PER_CHUNK // columns) // unit)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
