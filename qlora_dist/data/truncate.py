"""Truncation: what happens to sequences that are longer than a row."""

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
    """Parts of sequences, each with a trained token. Arrays take 16 bytes per segment, unlike Python objects."""

    sequence_index: npt.NDArray[np.integer]
    """int32[segments] (int64 from 2^31 sequences on): index of the sequence."""
    start: npt.NDArray[np.int32]
    """int32[segments]: position of the first token in the sequence. That token is not a target, because nothing
    predicts it."""
    length: npt.NDArray[np.int32]
    """int32[segments]: number of tokens."""
    loss_tokens: npt.NDArray[np.int32]
    """int32[segments]: number of targets, at least one."""

    def __len__(self) -> int:
        return len(self.sequence_index)

    def take(self, order: npt.NDArray[np.int64]) -> Segments:
        return Segments(*(getattr(self, field.name)[order] for field in fields(self)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncationStats:
    """Counts of a source's sequences and segments."""

    sequences: int
    truncated: int
    """Trained sequences that were cut to `seq_len`."""
    split: int
    """Sequences that were split into several segments."""
    split_segments: int
    """Segments of the split sequences."""
    dropped: int
    """Sequences that were dropped because they are too long."""
    untrained: int
    """Segments that were dropped because they have no target. A sequence that was not split is one segment."""
    segments: int
    """Segments that are trained. The next two fields count their tokens and targets."""
    tokens: int
    trained_tokens: int
    cut_answers: int = 0
    """Trained stretches that lie completely after the cut, or in a dropped sequence."""
    cut_trained_tokens: int = 0
    """Targets that are lost because of the length."""

    def describe(self, seq_len: int) -> str:
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
    """Cut sequences to at most `seq_len` tokens, and drop segments without a target.

    - `truncate` keeps the first `seq_len` tokens.
    - `split` keeps all tokens, in segments of `seq_len` tokens and a shorter last one. Equal parts would leave gaps in
      rows that nothing fits into.
    - `drop` drops longer sequences.

    Returns:
        Segments in the order of the sequences, and the counts.
    """
    lengths, loss_token_counts = sequences.lengths, sequences.loss_token_counts
    too_long_indices = np.flatnonzero(lengths > seq_len)
    kept_whole = np.flatnonzero((lengths <= seq_len) & (loss_token_counts > 0))
    untrained = len(sequences) - len(too_long_indices) - len(kept_whole)
    truncated = split = split_segments = cut_answers = 0
    columns = [array("q") for _ in fields(Segments)]
    for index in too_long_indices.tolist():
        if too_long != "split":
            cut_answers += _count_trained_runs(sequences.loss_mask(index), seq_len if too_long == "truncate" else 0)
        if too_long == "drop":
            continue
        end = int(lengths[index]) if too_long == "split" else seq_len
        starts = np.arange(0, end, seq_len)
        flags = sequences.loss_mask(index)[:end]
        ends = np.append(starts[1:], end)
        targets = np.diff(np.searchsorted(np.flatnonzero(flags), np.append(starts, end))) - flags[starts]
        kept = np.flatnonzero(targets)
        untrained += len(starts) - len(kept)
        if too_long == "split":
            split, split_segments = split + 1, split_segments + len(starts)
        else:
            truncated += len(kept)
        values = np.full(len(kept), index), starts[kept], (ends - starts)[kept], targets[kept]
        for column, value in zip(columns, values, strict=True):
            column.frombytes(value.tobytes())
    segments = Segments(
        _joined(kept_whole, columns[0], np.int32 if len(sequences) < 2**31 else np.int64),
        _joined(np.zeros(len(kept_whole), dtype=np.int32), columns[1], np.int32),
        _joined(lengths[kept_whole], columns[2], np.int32),
        _joined(loss_token_counts[kept_whole], columns[3], np.int32),
    )
    if columns[0]:
        segments = segments.take(np.argsort(segments.sequence_index, kind="stable"))
    trained_tokens = int(segments.loss_tokens.sum(dtype=np.int64))
    stats = TruncationStats(
        sequences=len(sequences),
        truncated=truncated,
        split=split,
        split_segments=split_segments,
        dropped=len(too_long_indices) if too_long == "drop" else 0,
        cut_answers=cut_answers,
        cut_trained_tokens=int(loss_token_counts.sum()) - trained_tokens,
        untrained=untrained,
        segments=len(segments),
        tokens=int(segments.length.sum(dtype=np.int64)),
        trained_tokens=trained_tokens,
    )
    return segments, stats


def _count_trained_runs(loss_mask: npt.NDArray[np.bool_], start: int) -> int:
    """Return the number of trained stretches that begin at `start` or later."""
    begins = loss_mask[start:].copy()
    begins[1:] &= ~loss_mask[start:-1]
    if start and len(begins):
        begins[0] &= ~loss_mask[start - 1]
    return int(begins.sum())


def _joined(fitting: npt.NDArray[np.integer], too_long: array[int], dtype: type[_Int]) -> npt.NDArray[_Int]:
    return np.concatenate([fitting.astype(dtype), np.frombuffer(too_long, dtype=np.int64).astype(dtype)])
