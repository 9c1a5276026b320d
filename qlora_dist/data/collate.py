"""The packed rows of a source, and the batches that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from qlora_dist.config.sections import DataConfig
from qlora_dist.data.packing import pack_sequences
from qlora_dist.data.tokenized import TokenizedSequences
from qlora_dist.data.truncate import Segments, TruncationStats, truncate_sequences
from qlora_dist.errors import UserError

LABEL_IGNORE_INDEX = -100
"""Label of a token that is not trained (`ignore_index` of `torch.nn.functional.cross_entropy`)."""
PADDING_ROW = -1
"""Row index that stands for a row of padding, which has no labels."""
PAD_TO_MULTIPLE_OF = 16
"""Without packing, batch lengths are rounded up to a multiple of this. Kernels prefer it, and shapes repeat."""


class Batch(NamedTuple):
    """Inputs of one forward pass on one rank, on the CPU."""

    input_ids: torch.Tensor
    """int64[micro_batch, length]. With packing, length is `seq_len`; without, it fits the longest row."""
    labels: torch.Tensor
    """int64[micro_batch, length], already shifted: label t is token t + 1 of the same sequence if that is trained, else
    -100."""
    position_ids: torch.Tensor
    """int64[micro_batch, length], counted from 0 in each sequence. The padding at the end is a sequence of its own."""


class PackedRow(NamedTuple):
    """Content of one row, without padding."""

    tokens: npt.NDArray[np.int32]
    """int32[tokens]"""
    labels: npt.NDArray[np.int64]
    """int64[tokens], already shifted."""
    sequence_starts: list[int]
    """Index of each sequence's first token."""


EMPTY_ROW = PackedRow(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64), [])
"""Content of the row `PADDING_ROW`."""


@dataclass(frozen=True, kw_only=True)
class PackedDataset:
    """Packed rows of one source. They are equal on all ranks, so every rank can count the tokens of every row."""

    name: str
    sequences: TokenizedSequences
    segments: Segments
    """Segments of the sequences, in the order of the rows."""
    offsets: npt.NDArray[np.int64]
    """int64[rows + 1]: row i holds the segments offsets[i]:offsets[i + 1]."""
    truncation_stats: TruncationStats
    seq_len: int
    is_packed: bool
    """True if batches have the length `seq_len`; false if they are as long as their longest row."""
    pad_token_id: int
    row_tokens: npt.NDArray[np.int64]
    """int64[rows]: tokens per row, without padding."""
    row_loss_tokens: npt.NDArray[np.int64]
    """int64[rows]: labels per row that are not -100."""

    def __len__(self) -> int:
        return len(self.row_tokens)

    @property
    def utilization(self) -> float:
        """Return the fraction of the rows' `seq_len` tokens that is not padding."""
        return float(self.row_tokens.sum()) / (len(self) * self.seq_len)

    def describe(self) -> str:
        rows = "1 row" if len(self) == 1 else f"{len(self):,} rows"
        packed = f"; packed into {rows}, {100 * (1 - self.utilization):.1f} % padding" if self.is_packed else ""
        return f"{self.name}: {self.truncation_stats.describe(self.seq_len)}{packed}"

    def read_row(self, index: int) -> PackedRow:
        segment_slice = slice(*self.offsets[index : index + 2].tolist())
        tokens: list[npt.NDArray[np.int32]] = []
        labels: list[npt.ArrayLike] = []
        starts: list[int] = []
        row_offset = 0
        for sequence, start, length in zip(
            *(
                column[segment_slice].tolist()
                for column in (self.segments.sequence_index, self.segments.start, self.segments.length)
            ),
            strict=True,
        ):
            segment_tokens = self.sequences.tokens(sequence)[start : start + length]
            loss_mask = self.sequences.loss_mask(sequence)[start : start + length]
            # The first token of a sequence is never a label, and the last token has none.
            labels += [np.where(loss_mask[1:], segment_tokens[1:], LABEL_IGNORE_INDEX), [LABEL_IGNORE_INDEX]]
            tokens.append(segment_tokens)
            starts.append(row_offset)
            row_offset += length
        return PackedRow(np.concatenate(tokens), np.concatenate(labels), starts)

    def padded_length(self, longest_row: int) -> int:
        """Return the length of a batch whose longest row has `longest_row` tokens."""
        multiples = max(1, -(-longest_row // PAD_TO_MULTIPLE_OF))
        return self.seq_len if self.is_packed else min(self.seq_len, multiples * PAD_TO_MULTIPLE_OF)

    def batch(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> Batch:
        """Return the rows as one batch. The index `PADDING_ROW` gives a row of padding."""
        return self.collate([self.read_row(int(index)) if index != PADDING_ROW else EMPTY_ROW for index in indices])

    def collate(self, rows: Sequence[PackedRow]) -> Batch:
        """Pad rows to one batch. They may be from another source with the same configuration."""
        length = self.padded_length(max(len(row.tokens) for row in rows))
        shape = (len(rows), length)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, LABEL_IGNORE_INDEX, dtype=np.int64)
        position_ids = np.empty(shape, dtype=np.int64)
        for index, row in enumerate(rows):
            input_ids[index, : len(row.tokens)] = row.tokens
            labels[index, : len(row.tokens)] = row.labels
            # The last start belongs to the padding. In a full row it is `length`, and the padding is empty.
            starts = [*row.sequence_starts, len(row.tokens)]
            position_ids[index] = np.arange(length) - np.repeat(starts, np.diff([*starts, length]))
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(position_ids))


def build_packed_dataset(
    sequences: TokenizedSequences, config: DataConfig, pad_token_id: int, name: str = "data"
) -> PackedDataset:
    """Truncate, pack and count a source's sequences.

    Any token of the embedding may be `pad_token_id`, because no label and no other sequence depends on the padding.
    """
    segments, truncation_stats = truncate_sequences(sequences, config.seq_len, config.too_long)
    if not len(segments):
        raise UserError(
            f"{name}: none of the {len(sequences)} rows has a token to train within data.seq_len: {config.seq_len}; "
            "raise it, or give rows with a non-empty `text` or with messages of the role 'assistant'"
        )
    order, offsets = pack_sequences(segments.length, config.seq_len, config.packing)
    segments = segments.take(order)
    return PackedDataset(
        name=name,
        sequences=sequences,
        segments=segments,
        offsets=offsets,
        truncation_stats=truncation_stats,
        seq_len=config.seq_len,
        is_packed=config.packing != "none",
        pad_token_id=pad_token_id,
        row_tokens=np.add.reduceat(segments.length, offsets[:-1], dtype=np.int64),
        row_loss_tokens=np.add.reduceat(segments.loss_tokens, offsets[:-1], dtype=np.int64),
    )
