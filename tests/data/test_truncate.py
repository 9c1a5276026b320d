"""If this fails, long rows are cut wrongly, or the numbers told to the user about the data are not true."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.data.tokenized import TokenizedSequences
from qlora_dist.data.truncate import TruncationStats, truncate_sequences


def make_sequences(*flags: list[int]) -> TokenizedSequences:
    """Of these targets; sequence i has the tokens 100 i, 100 i + 1, ..."""
    return TokenizedSequences.of(
        ([100 * i + t for t in range(len(sequence))], [bool(flag) for flag in sequence])
        for i, sequence in enumerate(flags)
    )


BY_HAND = make_sequences(
    [0, 1, 1, 1, 1, 1, 1, 1, 1, 1],  # 4 | 4 | 2
    [0, 1, 0, 1],  # just fits
    [0, 0, 0, 0, 0, 1],  # a target in the second piece only
    [0, 0, 0, 0, 1],  # the target is the second piece's first token
    [0, 0, 0],  # none at all
    [],
    [0, 1, 1, 1, 1],  # one token too long, which is left alone
)


@pytest.mark.parametrize(
    ("too_long", "expected", "fate"),
    [
        (
            "truncate",
            [(0, 0, 4, 3), (1, 0, 4, 2), (6, 0, 4, 3)],
            TruncationStats(
                7,
                truncated=2,
                split=0,
                split_segments=0,
                dropped=0,
                untrained=4,
                pieces=3,
                tokens=12,
                trained_tokens=8,
                cut_answers=2,
                cut_trained_tokens=9,
            ),
        ),
        (
            "split",
            [(0, 0, 4, 3), (0, 4, 4, 3), (0, 8, 2, 1), (1, 0, 4, 2), (2, 4, 2, 1), (6, 0, 4, 3)],
            TruncationStats(
                7,
                truncated=0,
                split=4,
                split_segments=9,
                dropped=0,
                untrained=6,
                pieces=6,
                tokens=20,
                trained_tokens=13,
                cut_answers=0,
                cut_trained_tokens=4,
            ),
        ),
        (
            "drop",
            [(1, 0, 4, 2)],
            TruncationStats(
                7,
                truncated=0,
                split=0,
                split_segments=0,
                dropped=4,
                untrained=2,
                pieces=1,
                tokens=4,
                trained_tokens=2,
                cut_answers=4,
                cut_trained_tokens=15,
            ),
        ),
    ],
)
def test_by_hand(too_long, expected, fate):
    pieces, counts = truncate_sequences(BY_HAND, 4, too_long)
    columns = (pieces.sequence_index, pieces.start, pieces.length, pieces.trained)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    assert counts == fate


def test_what_is_told():
    assert [truncate_sequences(BY_HAND, 4, too_long)[1].sentence(4) for too_long in ("truncate", "split", "drop")] == [
        "7 sequences, 2 cut to 4 tokens, 9 trained tokens and 2 whole answers lost to the length, "
        "4 without a token to train left out; 12 tokens, 8 trained",
        "7 sequences, 4 split into 9 pieces, 4 trained tokens lost to the length, "
        "6 without a token to train left out; 20 tokens, 13 trained",
        "7 sequences, 4 longer than 4 tokens dropped, 15 trained tokens and 4 whole answers lost to the length, "
        "2 without a token to train left out; 4 tokens, 2 trained",
    ]


@given(
    flags=st.lists(st.lists(st.booleans(), max_size=40), max_size=12),
    seq_len=st.integers(1, 12),
    too_long=st.sampled_from(["truncate", "split", "drop"]),
)
def test_every_target_that_can_be_trained_is_in_one_piece(flags, seq_len, too_long):
    """Whatever the policy, the pieces hold each (sequence, place) at most once, and split loses only what it must."""
    sequences = make_sequences(*flags)
    pieces, fate = truncate_sequences(sequences, seq_len, too_long)
    covered = Counter()
    targets = set()
    for sequence, start, length, trained in zip(
        pieces.sequence_index, pieces.start, pieces.length, pieces.trained, strict=True
    ):
        assert 1 <= length <= seq_len
        here = [(int(sequence), place) for place in range(start, start + length)]
        covered.update(here)
        inside = [place for place in here[1:] if sequences.trained(place[0])[place[1]]]
        assert len(inside) == trained > 0, "nothing predicts a piece's first token"
        targets.update(inside)
    assert not covered or max(covered.values()) == 1
    assert list(pieces.sequence_index) == sorted(pieces.sequence_index)
    everything = {(i, t) for i, f in enumerate(flags) for t in range(1, len(f)) if f[t]}
    expected = {
        "truncate": {(i, t) for i, t in everything if t < seq_len},
        "split": {(i, t) for i, t in everything if t % seq_len},
        "drop": {(i, t) for i, t in everything if len(flags[i]) <= seq_len},
    }
    assert targets == expected[too_long]
    assert (fate.pieces, fate.tokens, fate.trained_tokens) == (len(pieces), covered.total(), len(targets))
    parts = [max(1, -(-len(f) // seq_len)) if too_long == "split" else 1 for f in flags]
    assert sum(parts) == fate.pieces + fate.untrained + fate.dropped, "each part has met one fate"
