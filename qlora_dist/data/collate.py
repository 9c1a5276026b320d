"""A source's rows, and the batches made of them."""

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
"""The label of a position that is not trained (torch.nn.functional.cross_entropy's ignore_index)."""
PADDING_ROW = -1
"""In a list of row indices: a row of padding, of weight zero."""
PAD_TO_MULTIPLE_OF = 16
"""Without packing, batches are padded to a multiple of it: kernels like that, and shapes repeat."""


class Batch(NamedTuple):
    """One forward pass of one rank, on the CPU."""

    input_ids: torch.Tensor
    """int64[micro_batch, length]; length is `seq_len` with packing, and without as much as the longest row needs."""
    labels: torch.Tensor
    """int64[micro_batch, length], already shifted: at t the token t + 1 of the same sequence if that is
    trained, else -100."""
    position_ids: torch.Tensor
    """int64[micro_batch, length], from 0 in each sequence; the padding behind is a sequence of its own."""


class PackedRow(NamedTuple):
    """What a row holds, without padding."""

    tokens: npt.NDArray[np.int32]
    """int32[tokens]"""
    labels: npt.NDArray[np.int64]
    """int64[tokens], shifted."""
    starts: list[int]
    """Where each sequence begins."""


EMPTY_ROW = PackedRow(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64), [])
"""The row `PADDING_ROW`."""


@dataclass(frozen=True)
class PackedDataset:
    """The rows of one source. The same on every rank, so that any of them can count any row's tokens."""

    name: str
    """The source's, for people."""
    sequences: TokenizedSequences
    pieces: Segments
    """In the order of the rows."""
    offsets: npt.NDArray[np.int64]
    """int64[rows + 1]: row i holds the pieces offsets[i]:offsets[i + 1]."""
    fate: TruncationStats
    """What became of the sequences."""
    seq_len: int
    packed: bool
    """Batches have the length `seq_len`; else that of their longest row."""
    pad_id: int
    tokens: npt.NDArray[np.int64]
    """int64[rows]: tokens in the row, padding not counted."""
    trained_tokens: npt.NDArray[np.int64]
    """int64[rows]: labels in the row that are not -100."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def utilization(self) -> float:
        """The part of all positions of rows of `seq_len` that is not padding."""
        return float(self.tokens.sum()) / (len(self) * self.seq_len)

    def sentence(self) -> str:
        """What became of the source, for people."""
        rows = "1 row" if len(self) == 1 else f"{len(self):,} rows"
        packed = f"; packed into {rows}, {100 * (1 - self.utilization):.1f} % padding" if self.packed else ""
        return f"{self.name}: {self.fate.sentence(self.seq_len)}{packed}"

    def row(self, index: int) -> PackedRow:
        """Read a row from the sequences."""
        segment_slice = slice(*self.offsets[index : index + 2].tolist())
        tokens: list[npt.NDArray[np.int32]] = []
        labels: list[npt.ArrayLike] = []
        starts: list[int] = []
        row_offset = 0
        for sequence, start, length in zip(
            *(
                column[segment_slice].tolist()
                for column in (self.pieces.sequence_index, self.pieces.start, self.pieces.length)
            ),
            strict=True,
        ):
            segment_tokens = self.sequences.tokens(sequence)[start : start + length]
            loss_mask = self.sequences.trained(sequence)[start : start + length]
            # the first token is nobody's label, and the last has none
            labels += [np.where(loss_mask[1:], segment_tokens[1:], LABEL_IGNORE_INDEX), [LABEL_IGNORE_INDEX]]
            tokens.append(segment_tokens)
            starts.append(row_offset)
            row_offset += length
        return PackedRow(np.concatenate(tokens), np.concatenate(labels), starts)

    def length(self, longest_row: int) -> int:
        """How long a batch is whose longest row has so many tokens."""
        return self.seq_len if self.packed else min(self.seq_len, _round_up(longest_row))

    def batch(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> Batch:
        """The rows `indices` (`PADDING_ROW`: nothing but padding) as one batch."""
        return self.collate([self.row(int(index)) if index != PADDING_ROW else EMPTY_ROW for index in indices])

    def collate(self, rows: Sequence[PackedRow]) -> Batch:
        """Rows, of this source or another of the same configuration, as one batch."""
        length = self.length(max(len(row.tokens) for row in rows))
        shape = (len(rows), length)
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        labels = np.full(shape, LABEL_IGNORE_INDEX, dtype=np.int64)
        position_ids = np.empty(shape, dtype=np.int64)
        for index, row in enumerate(rows):
            input_ids[index, : len(row.tokens)] = row.tokens
            labels[index, : len(row.tokens)] = row.labels
            # the last start is the padding's; in a full row it is `length` and counts nothing
            starts = [*row.starts, len(row.tokens)]
            position_ids[index] = np.arange(length) - np.repeat(starts, np.diff([*starts, length]))
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(position_ids))


def _round_up(longest: int) -> int:
    return max(1, -(-longest // PAD_TO_MULTIPLE_OF)) * PAD_TO_MULTIPLE_OF


def build_packed_dataset(
    sequences: TokenizedSequences, config: DataConfig, pad_token_id: int, name: str = "data"
) -> PackedDataset:
    """Cut, pack and count a source's sequences.

    Args:
        sequences: of any length.
        config: `seq_len`, `too_long` and `packing` of it.
        pad_token_id: any id that the embedding has: no label and no other sequence sees the padding.
        name: the source's, for people.

    Raises:
        UserError: none of the sequences has a token to train.
    """
    pieces, fate = truncate_sequences(sequences, config.seq_len, config.too_long)
    if not len(pieces):
        raise UserError(
            f"{name}: none of the {len(sequences)} rows has a token to train within data.seq_len: {config.seq_len}; "
            "raise it, or give rows with a non-empty `text` or with messages of the role 'assistant'"
        )
    order, offsets = pack_sequences(pieces.length, config.seq_len, config.packing)
    pieces = pieces.take(order)
    return PackedDataset(
        name=name,
        sequences=sequences,
        pieces=pieces,
        offsets=offsets,
        fate=fate,
        seq_len=config.seq_len,
        packed=config.packing != "none",
        pad_id=pad_token_id,
        tokens=np.add.reduceat(pieces.length, offsets[:-1], dtype=np.int64),
        trained_tokens=np.add.reduceat(pieces.trained, offsets[:-1], dtype=np.int64),
    )
