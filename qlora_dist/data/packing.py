"""Which sequences share a row. Arithmetic only."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

PackingMethod = Literal["best-fit", "none"]

PACKING_WINDOW = 2**17
"""Sequences that are packed at a time, so that a row's lie near each other in the data, and any number of them takes
bounded memory. Windows of twice the size fill less than 0.1 % more."""


class PackingResult(NamedTuple):
    """Sequences dealt out to rows."""

    order: npt.NDArray[np.int64]
    """int64[sequences]: their indices, row by row, ascending in each."""
    offsets: npt.NDArray[np.int64]
    """int64[rows + 1]: row i holds order[offsets[i]:offsets[i + 1]]."""


def pack_sequences(
    lengths: npt.NDArray[np.integer], seq_len: int, method: PackingMethod, window: int = PACKING_WINDOW
) -> PackingResult:
    """Put sequences into rows of at most `seq_len` tokens.

    best-fit: in each window of the data, the longest sequence first (ties: lowest index first), each into the row that
    it leaves the least room in (ties: oldest row). No two rows of a window would fit into one. none: each sequence has
    its own row.

    Args:
        lengths: tokens of each sequence, each in 1..seq_len.
        seq_len: tokens a row holds.
        method: how.
        window: sequences that are packed at a time.

    Returns:
        The rows in the order of their first index, window by window. The same for the same arguments, on every rank.
    """
    assert not len(lengths) or (lengths.min() >= 1 and lengths.max() <= seq_len), "cut before they are packed"
    if method == "none":
        return PackingResult(np.arange(len(lengths)), np.arange(len(lengths) + 1))
    orders, counts = [np.empty(0, dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
    for begin in range(0, len(lengths), window):
        order, count = _group_by_row(_best_fit(lengths[begin : begin + window], seq_len))
        orders.append(order + begin)
        counts.append(count)
    return PackingResult(np.concatenate(orders), np.cumsum(np.concatenate(counts)))


def _best_fit(lengths: npt.NDArray[np.integer], seq_len: int) -> npt.NDArray[np.int64]:
    """int64[sequences]: the row of each, rows numbered as they are opened.

    Sequences of one length are placed together, and so are rows with the same room: the work grows with the number of
    different lengths, of which there are at most `seq_len`, not with that of sequences.
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    with_room: dict[int, list[npt.NDArray[np.int64]]] = {}
    rooms: list[int] = []  # the keys of with_room, ascending
    opened = placed = 0
    for length, left in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            smallest = bisect_left(rooms, length)
            if smallest < len(rooms):
                room = rooms.pop(smallest)
                rows = np.sort(np.concatenate(with_room.pop(room)))
            else:
                room = seq_len
                rows = np.arange(opened, opened + -(-left // (seq_len // length)))
                opened += len(rows)
            # a row that has taken one has the least room of all, so it goes on until it can take no more
            each = room // length
            full = min(len(rows), left // each)
            rest = left % each if full < len(rows) else 0
            taken = np.repeat(rows[: full + (rest > 0)], [each] * full + [rest] * (rest > 0))
            row_of[by_length[placed : placed + len(taken)]] = taken
            placed += len(taken)
            left -= len(taken)
            for some, now in (
                (rows[:full], room - each * length),
                (rows[full : full + (rest > 0)], room - rest * length),
                (rows[full + (rest > 0) :], room),
            ):
                if not len(some) or not now:
                    continue
                if now not in with_room:
                    with_room[now] = []
                    insort(rooms, now)
                with_room[now].append(some)
    return row_of


def _group_by_row(row_of: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The sequences row by row, rows in the order of their first sequence; and how many each row has."""
    order = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of)
    firsts = order[np.cumsum(counts) - counts]
    ranking = np.argsort(firsts)
    place = np.empty_like(ranking)
    place[ranking] = np.arange(len(ranking))
    return np.argsort(place[row_of], kind="stable"), counts[ranking]
