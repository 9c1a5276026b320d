"""Uncut token sequences in Arrow record batches. A file of them is mapped into memory and not read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

RECORD_BATCH_TOKENS = 2**22
"""Tokens from which a record batch is written (20 MiB of tokens and flags)."""

_SCHEMA = pa.schema(
    [
        pa.field("tokens", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("trained", pa.list_(pa.field("item", pa.uint8(), nullable=False)), nullable=False),
        pa.field("trained_length", pa.int32(), nullable=False),
    ]
)


class TokenizedSequences:
    """Sequences by index. The tokens of a file stay on disk, apart from the operating system's page cache."""

    lengths: npt.NDArray[np.int64]
    """int64[sequences]: tokens per sequence."""
    loss_token_counts: npt.NDArray[np.int64]
    """int64[sequences]: trained tokens per sequence."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self.batches = list(batches)
        self._tokens = [_values(batch, "tokens") for batch in self.batches]
        self._loss_masks = [_values(batch, "trained").view(np.bool_) for batch in self.batches]
        # Offsets of a sliced batch do not begin at 0, because they count from the beginning of the values.
        self._offsets = [np.from_dlpack(batch.column("tokens").offsets) for batch in self.batches]
        self._batch_starts = [0]
        for batch in self.batches:
            self._batch_starts.append(self._batch_starts[-1] + batch.num_rows)
        no_lengths = [np.empty(0, dtype=np.int64)]
        self.lengths = np.concatenate(no_lengths + [np.diff(offsets).astype(np.int64) for offsets in self._offsets])
        counts = [np.from_dlpack(batch.column("trained_length")) for batch in self.batches]
        self.loss_token_counts = np.concatenate(no_lengths + [part.astype(np.int64) for part in counts])

    @classmethod
    def open(cls, path: Path) -> TokenizedSequences:
        """Map a file that `SequenceWriter` wrote.

        Raises:
            pyarrow.ArrowInvalid: the file is of another kind.
        """
        with pa.memory_map(str(path)) as source:  # The batches keep the mapping.
            reader = pa.ipc.open_file(source)
            if not reader.schema.equals(_SCHEMA):
                raise pa.ArrowInvalid(f"{path.name} has other columns than sequences of tokens")
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)  # numpy would follow offsets beyond the tokens.
        return cls(batches)

    @classmethod
    def from_lists(cls, sequences: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> TokenizedSequences:
        """Return sequences in memory from pairs of tokens and loss mask; the first flag counts as False."""
        pairs = [(np.asarray(tokens, np.int32), np.asarray(trained, np.bool_)) for tokens, trained in sequences]
        return cls([_record_batch([FlatSequences.from_pairs(pairs)])])

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> npt.NDArray[np.int32]:
        """Return int32[length], a read-only view."""
        batch, start, end = self._locate(index)
        return self._tokens[batch][start:end]

    def loss_mask(self, index: int) -> npt.NDArray[np.bool_]:
        """Return bool[length], a read-only view: whether each token is trained; False for the first."""
        batch, start, end = self._locate(index)
        return self._loss_masks[batch][start:end]

    def _locate(self, index: int) -> tuple[int, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = bisect_right(self._batch_starts, index) - 1
        offsets, row = self._offsets[batch], index - self._batch_starts[batch]
        return batch, int(offsets[row]), int(offsets[row + 1])


class FlatSequences(NamedTuple):
    """Concatenated sequences."""

    lengths: npt.NDArray[np.int64]
    """int64[sequences]"""
    tokens: npt.NDArray[np.int32]
    """int32[tokens]"""
    loss_mask: npt.NDArray[np.bool_]
    """bool[tokens]: whether each token is trained. False for the first of each sequence, which nothing predicts."""

    @classmethod
    def from_pairs(cls, pairs: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]) -> FlatSequences:
        """Concatenate pairs of tokens and loss mask. The first flag of a sequence counts as False."""
        lengths = np.array([len(tokens) for tokens, _ in pairs], dtype=np.int64)
        tokens = np.concatenate([np.empty(0, dtype=np.int32), *(tokens for tokens, _ in pairs)])
        trained = np.concatenate([np.empty(0, dtype=np.bool_), *(trained for _, trained in pairs)])
        trained[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
        return cls(lengths, tokens, trained)


class SequenceWriter:
    """Writer of sequences, which holds at most one record batch in memory."""

    def __init__(self, path: Path, batch_tokens: int = RECORD_BATCH_TOKENS) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA)
        self._batch_tokens = batch_tokens
        self._pending: list[FlatSequences] = []

    def append(self, sequences: FlatSequences) -> None:
        self._pending.append(sequences)
        if sum(len(part.tokens) for part in self._pending) >= self._batch_tokens:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(_record_batch(self._pending))
            self._pending = []

    def __enter__(self) -> SequenceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._flush()
                self._writer.close()


def _record_batch(parts: Sequence[FlatSequences]) -> pa.RecordBatch:
    lengths, tokens, trained = (np.concatenate(column) for column in zip(*parts, strict=True))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    trained_lengths = np.diff(np.concatenate([[0], np.cumsum(trained)])[offsets])
    arrow_offsets = _arrow(offsets, pa.int32())
    columns = [
        pa.ListArray.from_arrays(arrow_offsets, _arrow(tokens, pa.int32()), type=_SCHEMA.field("tokens").type),
        pa.ListArray.from_arrays(arrow_offsets, _arrow(trained, pa.uint8()), type=_SCHEMA.field("trained").type),
        _arrow(trained_lengths, pa.int32()),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def _arrow(values: npt.NDArray[np.generic], arrow_type: pa.DataType) -> pa.Array:
    """Return the same array as `pa.array`, without importing pandas."""
    buffer = pa.py_buffer(np.ascontiguousarray(values, dtype=arrow_type.to_pandas_dtype()))
    return pa.Array.from_buffers(arrow_type, len(values), [None, buffer])


def _values(batch: pa.RecordBatch, name: str) -> npt.NDArray[Any]:
    # to_numpy would import pandas, which takes half a second on every rank.
    return np.from_dlpack(batch.column(name).values)
