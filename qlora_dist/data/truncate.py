"""What becomes of sequences that are longer than a row."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from qlora_dist.data.tokenized import TokenizedSequences

TruncationMode = Literal["truncate", "split", "drop"]
_Int = TypeVar("_Int", bound=np.integer)


@dataclass(frozen=True, slots=True)
class Segments:
    """Parts of sequences, each with a token to train. Arrays, no Python object for each: 16 bytes a piece."""

    sequence_index: npt.NDArray[np.integer]
    """int32[pieces] (int64 from 2^31 sequences on): which sequence it is a part of."""
    start: npt.NDArray[np.int32]
    """int32[pieces]: its first token's place in the sequence. That token is no target: nothing predicts it."""
    length: npt.NDArray[np.int32]
    """int32[pieces]: its tokens."""
    trained: npt.NDArray[np.int32]
    """int32[pieces]: its targets, at least one."""

    def __len__(self) -> int:
        return len(self.sequence_index)

    def take(self, order: npt.NDArray[np.int64]) -> Segments:
        """These of them, in this order."""
        return Segments(*(getattr(self, field.name)[order] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class TruncationStats:
    """What became of a source's sequences."""

    sequences: int
    """All of them."""
    truncated: int
    """Cut to the length, of those that are trained."""
    split: int
    """Cut into several pieces."""
    split_segments: int
    """The pieces that these became."""
    dropped: int
    """Left out because they are too long."""
    untrained: int
    """Pieces left out because they have no target. A sequence that was not split is one piece."""
    pieces: int
    """What is trained."""
    tokens: int
    """In these pieces."""
    trained_tokens: int
    """Of these, targets; never a piece's first."""
    cut_answers: int = 0
    """Trained stretches that lie whole behind the cut, or in a sequence that was dropped."""
    cut_trained_tokens: int = 0
    """Targets that are not trained because of the length."""

    def sentence(self, seq_len: int) -> str:
        """For people, without what did not happen."""
        parts = [f"{self.sequences:,} sequences"]
        if self.truncated:
            parts.append(f"{self.truncated:,} cut to {seq_len:,} tokens")
        if self.split:
            parts.append(f"{self.split:,} split into {self.split_segments:,} pieces")
        if self.dropped:
            parts.append(f"{self.dropped:,} longer than {seq_len:,} tokens dropped")
        if self.cut_trained_tokens:
            answers = f" and {self.cut_answers:,} whole answers" if self.cut_answers else ""
            parts.append(f"{self.cut_trained_tokens:,} trained tokens{answers} lost to the length")
        if self.untrained:
            parts.append(f"{self.untrained:,} without a token to train left out")
        return f"{', '.join(parts)}; {self.tokens:,} tokens, {self.trained_tokens:,} trained"


def truncate_sequences(
    sequences: TokenizedSequences, seq_len: int, too_long: TruncationMode
) -> tuple[Segments, TruncationStats]:
    """Cut sequences to at most `seq_len` tokens, and leave out what has no target then.

    truncate: the first `seq_len` tokens. split: one behind the other, all but the last of `seq_len` tokens: full rows,
    where equal parts would leave gaps that nothing fits into. drop: no sequence that is longer.

    Args:
        sequences: of any length.
        seq_len: the most tokens a piece has.
        too_long: what to do with those that have more.

    Returns:
        The pieces in the order of the sequences, and the counts.
    """
    lengths, trained = sequences.lengths, sequences.loss_token_counts
    too_long_indices = np.flatnonzero(lengths > seq_len)
    kept_whole = np.flatnonzero((lengths <= seq_len) & (trained > 0))
    untrained = len(sequences) - len(too_long_indices) - len(kept_whole)
    truncated = split = split_pieces = cut_answers = 0
    columns = [array("q") for _ in fields(Segments)]
    for index in too_long_indices.tolist():
        if too_long != "split":
            cut_answers += _count_trained_runs(sequences.trained(index), seq_len if too_long == "truncate" else 0)
        if too_long == "drop":
            continue
        end = int(lengths[index]) if too_long == "split" else seq_len
        starts = np.arange(0, end, seq_len)
        flags = sequences.trained(index)[:end]
        ends = np.append(starts[1:], end)
        targets = np.diff(np.searchsorted(np.flatnonzero(flags), np.append(starts, end))) - flags[starts]
        kept = np.flatnonzero(targets)
        untrained += len(starts) - len(kept)
        if too_long == "split":
            split, split_pieces = split + 1, split_pieces + len(starts)
        else:
            truncated += len(kept)
        values = np.full(len(kept), index), starts[kept], (ends - starts)[kept], targets[kept]
        for column, value in zip(columns, values, strict=True):
            column.frombytes(value.tobytes())
    pieces = Segments(
        _joined(kept_whole, columns[0], np.int32 if len(sequences) < 2**31 else np.int64),
        _joined(np.zeros(len(kept_whole), dtype=np.int32), columns[1], np.int32),
        _joined(lengths[kept_whole], columns[2], np.int32),
        _joined(trained[kept_whole], columns[3], np.int32),
    )
    if columns[0]:
        pieces = pieces.take(np.argsort(pieces.sequence_index, kind="stable"))
    trained_tokens = int(pieces.trained.sum(dtype=np.int64))
    stats = TruncationStats(
        sequences=len(sequences),
        truncated=truncated,
        split=split,
        split_segments=split_pieces,
        dropped=len(too_long_indices) if too_long == "drop" else 0,
        cut_answers=cut_answers,
        cut_trained_tokens=int(trained.sum()) - trained_tokens,
        untrained=untrained,
        pieces=len(pieces),
        tokens=int(pieces.length.sum(dtype=np.int64)),
        trained_tokens=trained_tokens,
    )
    return pieces, stats


def _count_trained_runs(loss_mask: npt.NDArray[np.bool_], start: int) -> int:
    """Return how many stretches of trained tokens begin at `start` or later."""
    begins = loss_mask[start:].copy()
    begins[1:] &= ~loss_mask[start:-1]
    if start and len(begins):
        begins[0] &= ~loss_mask[start - 1]
    return int(begins.sum())


def _joined(some: npt.NDArray[np.integer], others: array[int], dtype: type[_Int]) -> npt.NDArray[_Int]:
    return np.concatenate([some.astype(dtype), np.frombuffer(others, dtype=np.int64).astype(dtype)])
