"""If this fails, a sequence sees or predicts its neighbour in the row, or its tokens are shifted by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.config.sections import DataConfig
from qlora_dist.data.collate import LABEL_IGNORE_INDEX, PADDING_ROW, PackedDataset, build_packed_dataset
from qlora_dist.data.tokenized import TokenizedSequences
from qlora_dist.errors import UserError


def make_sequences(*sequences: tuple[list[int], list[int]]) -> TokenizedSequences:
    """Return sequences from pairs of tokens and flags."""
    return TokenizedSequences.from_lists((tokens, [bool(flag) for flag in flags]) for tokens, flags in sequences)


def rows_of(
    sequences: TokenizedSequences, seq_len: int, packing: str = "best-fit", pad_id: int = 0, **options: str
) -> PackedDataset:
    return build_packed_dataset(
        sequences, DataConfig(train=["a"], seq_len=seq_len, packing=packing, **options), pad_id, "a"
    )


# The lengths are 5, 6, 2 and 8, for rows of 8 tokens.
BY_HAND = make_sequences(
    ([10, 11, 12, 13, 14], [0, 0, 1, 1, 0]),
    ([20, 21, 22, 23, 24, 25], [0, 1, 0, 0, 0, 1]),
    ([30, 31], [0, 1]),
    ([40, 41, 42, 43, 44, 45, 46, 47], [0, 1, 1, 1, 1, 1, 1, 1]),
)
x = LABEL_IGNORE_INDEX


def test_token_by_token():
    rows = rows_of(BY_HAND, 8, pad_id=99)
    assert len(rows) == 3
    input_ids, labels, position_ids = rows.batch([0, 1, 2, PADDING_ROW])
    # best-fit fills the row of the 6 with the 2, and leaves the 5 alone.
    assert input_ids.tolist() == [
        [10, 11, 12, 13, 14, 99, 99, 99],
        [20, 21, 22, 23, 24, 25, 30, 31],
        [40, 41, 42, 43, 44, 45, 46, 47],
        [99, 99, 99, 99, 99, 99, 99, 99],
    ]
    assert labels.tolist() == [
        [x, 12, 13, x, x, x, x, x],
        [21, x, x, x, 25, x, 31, x],
        [41, 42, 43, 44, 45, 46, 47, x],
        [x, x, x, x, x, x, x, x],
    ]
    assert position_ids.tolist() == [
        [0, 1, 2, 3, 4, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 0, 1],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]
    assert all(tensor.dtype == torch.int64 for tensor in (input_ids, labels, position_ids))
    assert rows.row_tokens.tolist() == [5, 8, 8]
    assert rows.row_loss_tokens.tolist() == [2, 3, 7]
    assert rows.utilization == 21 / 24


def test_segments_of_a_split_sequence_are_separate():
    rows = rows_of(BY_HAND, 4, too_long="split")
    input_ids, labels, position_ids = rows.batch(range(len(rows)))
    # The end of the 5 and the first four tokens of the 6 have at most one target after their first token.
    assert input_ids.tolist() == [
        [10, 11, 12, 13],
        [20, 21, 22, 23],
        [24, 25, 30, 31],
        [40, 41, 42, 43],
        [44, 45, 46, 47],
    ]
    assert labels.tolist() == [[x, 12, 13, x], [21, x, x, x], [25, x, 31, x], [41, 42, 43, x], [45, 46, 47, x]]
    assert position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_sequences_that_pack_out_of_order():
    """Sequence 2 joins sequence 0, and sequence 1 comes after both."""
    rows = rows_of(make_sequences(([1, 2], [0, 1]), ([3, 4, 5], [0, 1, 1]), ([6, 7], [0, 1])), 4)
    input_ids, labels, position_ids = rows.batch([1, 0])
    assert input_ids.tolist() == [[3, 4, 5, 0], [1, 2, 6, 7]]
    assert labels.tolist() == [
        [4, 5, LABEL_IGNORE_INDEX, LABEL_IGNORE_INDEX],
        [2, LABEL_IGNORE_INDEX, 7, LABEL_IGNORE_INDEX],
    ]
    assert position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize(
    ("seq_len", "lengths", "expected"),
    [(64, [3, 17], 32), (64, [3, 16], 16), (64, [], 16), (20, [3, 17], 20), (64, [64], 64)],
)
def test_without_packing_a_batch_is_as_long_as_its_longest_row_needs(seq_len, lengths, expected):
    sequences = make_sequences(*[([7] * n, [0] + [1] * (n - 1)) for n in [*lengths, 2]])
    rows = rows_of(sequences, seq_len, "none", pad_id=5)
    batch = rows.batch([*range(len(lengths)), PADDING_ROW])
    assert {tuple(tensor.shape) for tensor in batch} == {(len(lengths) + 1, expected)}
    assert (batch.input_ids == 7).sum(1).tolist() == [*lengths, 0]
    assert (batch.labels == 7).sum(1).tolist() == [*(n - 1 for n in lengths), 0]
    assert batch.position_ids[-1].tolist() == list(range(expected))


@given(
    st.lists(st.lists(st.booleans(), min_size=2, max_size=12), min_size=1, max_size=20).filter(
        lambda f: any(any(s[1:]) for s in f)
    )
)
def test_packed_rows_hold_the_same_targets_as_unpacked(flags):
    """The pairs (sequence so far, token to predict) do not depend on packing."""
    sequences = make_sequences(
        *[([100 * i + t for t in range(len(f))], [0, *f[1:]]) for i, f in enumerate(flags, start=1)]
    )
    expected = sorted(100 * i + t for i, f in enumerate(flags, start=1) for t in range(1, len(f)) if f[t])
    for method in ("best-fit", "none"):
        rows = rows_of(sequences, 12, method)
        input_ids, labels, position_ids = rows.batch(range(len(rows)))
        trained = labels != LABEL_IGNORE_INDEX
        assert sorted(labels[trained].tolist()) == expected
        assert torch.equal(labels[trained], input_ids[trained] + 1), "each token predicts the next"
        in_sequence = input_ids != 0
        assert torch.equal(position_ids[in_sequence], input_ids[in_sequence] % 100)
        assert rows.row_loss_tokens.tolist() == trained.sum(1).tolist()
        assert rows.row_tokens.tolist() == in_sequence.sum(1).tolist()


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_no_sequence_is_left(refusal, too_long):
    sequences = make_sequences(([1, 2, 3, 4], [0, 0, 0, 1]), ([1], [0]))
    with pytest.raises(UserError) as error:
        rows_of(sequences, 3, too_long=too_long)
    assert "a: none of the 2 rows has a token to train within data.seq_len: 3" in refusal(error.value)
