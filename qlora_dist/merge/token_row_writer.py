"""Trained rows of an embedding or head, put in their places while the other rows are written."""

from __future__ import annotations

import torch

from qlora_dist.adapters.saved_adapter import SavedTokenRows
from qlora_dist.io.safetensors_file import SafetensorsReader, SafetensorsWriter


class TokenRowWriter:
    """Writer of one matrix [vocabulary, h] that replaces rows, and that has the interface of `SafetensorsWriter`.

    The base's rows are written with `write`, in any pieces. Then `write_added_rows` writes the rows that follow them.
    """

    def __init__(
        self, rows: SavedTokenRows, dtype: torch.dtype, writer: SafetensorsWriter, reader: SafetensorsReader
    ) -> None:
        self._values = dict(sorted(zip(rows.ids, reader.read(rows.entry).to(dtype), strict=True)))
        self._columns, self._itemsize, self._writer, self._end = rows.entry.shape[1], dtype.itemsize, writer, 0

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Write a contiguous part of the base's matrix from its byte `start` on, with the trained rows in it."""
        flat = tensor.detach().flatten().clone()
        first = start // self._itemsize
        self._end = max(self._end, first + flat.numel())
        for token, row in self._values.items():
            begin, stop = max(first, token * self._columns), min(first + flat.numel(), (token + 1) * self._columns)
            if begin < stop:
                flat[begin - first : stop - first] = row[begin - token * self._columns : stop - token * self._columns]
        self._writer.write(name, flat, start)

    def write_added_rows(self, name: str) -> None:
        """Write the trained rows that follow the base's last row."""
        for token, row in self._values.items():
            if token * self._columns >= self._end:
                self._writer.write(name, row, token * self._columns * self._itemsize)
