"""If this fails, sequences are trained twice or never, or a run pays for padding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.data.packing import PackingMethod, pack_sequences

SEQ_LEN = 32
lengths_of_sequences = st.lists(st.integers(1, SEQ_LEN), max_size=60)
windows = st.integers(1, 70)


def packed(lengths: list[int], seq_len: int, method: PackingMethod, window: int = 1000) -> list[list[int]]:
    """Return the sequences of each row."""
    order, offsets = pack_sequences(np.array(lengths, dtype=np.int32), seq_len, method, window)
    assert (order.dtype, offsets.dtype) == (np.int64, np.int64)
    return [order[begin:end].tolist() for begin, end in pairwise(offsets)]


def best_fit_by_definition(lengths: list[int], seq_len: int) -> list[list[int]]:
    """Pack as the docstring defines it, with a search through all rows for each sequence."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = [seq_len - sum(lengths[i] for i in row) - lengths[index] for row in rows]
        fitting = [row for row, room in enumerate(left) if room >= 0]
        if fitting:
            rows[min(fitting, key=lambda row: left[row])].append(index)
        else:
            rows.append([index])
    return sorted(sorted(row) for row in rows)


def test_by_hand():
    # Longest first: 7 | 6 | 5. The first 3 joins 7 (no room left), the other joins 6 (room 1), and 2 joins 5.
    assert packed([3, 7, 5, 2, 6, 3], 10, "best-fit") == [[0, 1], [2, 3], [4, 5]]
    assert packed([3, 7, 5], 10, "none") == [[0], [1], [2]]
    assert packed([10, 10], 10, "best-fit") == [[0], [1]]
    assert packed([], 10, "best-fit") == packed([], 10, "none") == []


@given(lengths_of_sequences, windows)
def test_each_sequence_once_and_no_row_too_long(lengths, window):
    for method in ("best-fit", "none"):
        rows = packed(lengths, SEQ_LEN, method, window)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert all(0 < sum(lengths[index] for index in row) <= SEQ_LEN for row in rows)
        assert rows == sorted(rows), "rows are in the order of their first sequence"
        assert all(row == sorted(row) for row in rows)


@given(lengths_of_sequences, windows)
def test_no_two_rows_of_a_window_would_fit_into_one(lengths, window):
    filled: dict[int, list[int]] = {}
    for row in packed(lengths, SEQ_LEN, "best-fit", window):
        (of,) = {index // window for index in row}  # A row holds neighbours.
        filled.setdefault(of, []).append(sum(lengths[index] for index in row))
    for rows in filled.values():
        assert len(rows) == 1 or sum(sorted(rows)[:2]) > SEQ_LEN


@given(lengths_of_sequences)
def test_is_best_fit_decreasing(lengths):
    assert packed(lengths, SEQ_LEN, "best-fit") == best_fit_by_definition(lengths, SEQ_LEN)


@given(lengths_of_sequences, windows)
def test_windows_are_packed_one_by_one(lengths, window):
    one_by_one = [
        [begin + index for index in row]
        for begin in range(0, len(lengths), window)
        for row in packed(lengths[begin : begin + window], SEQ_LEN, "best-fit")
    ]
    assert packed(lengths, SEQ_LEN, "best-fit", window) == one_by_one


@pytest.mark.parametrize("median", [150, 600])
def test_a_large_data_set_is_packed_tightly(median):
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(median), 1, 200_000), 2, 2048).astype(np.int32)
    _, offsets = pack_sequences(lengths, 2048, "best-fit")
    assert lengths.sum() / ((len(offsets) - 1) * 2048) > 0.99
