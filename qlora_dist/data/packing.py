"""Packing: the assignment of sequences to rows, as pure arithmetic on lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

PackingMethod = Literal["best-fit", "none"]

PACKING_WINDOW = 2**17
"""Sequences that are packed at a time, which bounds memory and keeps a row's sequences near each other in the data.
Windows of twice the size fill less than 0.1 % more."""


class PackingResult(NamedTuple):
    """Assignment of sequences to rows."""

    order: npt.NDArray[np.int64]
    """int64[sequences]: sequence indices row by row, ascending within each row."""
    offsets: npt.NDArray[np.int64]
    """int64[rows + 1]: row i holds order[offsets[i]:offsets[i + 1]]."""


def pack_sequences(
    lengths: npt.NDArray[np.integer], seq_len: int, method: PackingMethod, window: int = PACKING_WINDOW
) -> PackingResult:
    """Put sequences into rows of at most `seq_len` tokens.

    - `best-fit` takes the sequences of a window from long to short (ties: lowest index first). Each goes into the row
      with the least room that holds it (ties: oldest row). No two rows of a window would fit into one.
    - `none` gives each sequence a row.

    Returns:
        Rows in the order of their first sequence, window by window. All ranks get equal results.
    """
    assert not len(lengths) or (lengths.min() >= 1 and lengths.max() <= seq_len), "truncate before packing"
    if method == "none":
        return PackingResult(np.arange(len(lengths)), np.arange(len(lengths) + 1))
    orders, counts = [np.empty(0, dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
    for begin in range(0, len(lengths), window):
        order, count = _group_by_row(_best_fit(lengths[begin : begin + window], seq_len))
        orders.append(order + begin)
        counts.append(count)
    return PackingResult(np.concatenate(orders), np.cumsum(np.concatenate(counts)))


def _best_fit(lengths: npt.NDArray[np.integer], seq_len: int) -> npt.NDArray[np.int64]:
    """Return int64[sequences]: the row of each sequence, numbered in the order in which rows are opened.

    Sequences of equal length are placed together, and so are rows with equal room. The work therefore grows with the
    number of different lengths, at most `seq_len`, and not with the number of sequences.
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    rows_by_free_length: dict[int, list[npt.NDArray[np.int64]]] = {}
    free_lengths: list[int] = []  # the keys of rows_by_free_length, ascending
    opened = placed = 0
    for length, remaining in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while remaining:
            smallest = bisect_left(free_lengths, length)
            if smallest < len(free_lengths):
                free_length = free_lengths.pop(smallest)
                rows = np.sort(np.concatenate(rows_by_free_length.pop(free_length)))
            else:
                free_length = seq_len
                rows = np.arange(opened, opened + -(-remaining // (seq_len // length)))
                opened += len(rows)
            # A row that has just taken a sequence has the least room, so it is filled until no more sequences fit.
            sequences_per_row = free_length // length
            full = min(len(rows), remaining // sequences_per_row)
            rest = remaining % sequences_per_row if full < len(rows) else 0
            assigned_rows = np.repeat(rows[: full + (rest > 0)], [sequences_per_row] * full + [rest] * (rest > 0))
            row_of[by_length[placed : placed + len(assigned_rows)]] = assigned_rows
            placed += len(assigned_rows)
            remaining -= len(assigned_rows)
            for row_group, free_after in (
                (rows[:full], free_length - sequences_per_row * length),
                (rows[full : full + (rest > 0)], free_length - rest * length),
                (rows[full + (rest > 0) :], free_length),
            ):
                if not len(row_group) or not free_after:
                    continue
                if free_after not in rows_by_free_length:
                    rows_by_free_length[free_after] = []
                    insort(free_lengths, free_after)
                rows_by_free_length[free_after].append(row_group)
    return row_of


def _group_by_row(row_of: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the sequences row by row, in the order of each row's first sequence, and the sequences per row."""
    order = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of)
    firsts = order[np.cumsum(counts) - counts]
    ranking = np.argsort(firsts)
    row_rank = np.empty_like(ranking)
    row_rank[ranking] = np.arange(len(ranking))
    return np.argsort(row_rank[row_of], kind="stable"), counts[ranking]
