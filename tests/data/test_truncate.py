"""If this fails, long rows are cut wrongly, or the statistics that a user sees are wrong."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.data.tokenized import TokenizedSequences
from qlora_dist.data.truncate import TruncationStats, truncate_sequences


def make_sequences(*flags: list[int]) -> TokenizedSequences:
    """Return sequences with these targets. Sequence i has the tokens 100 i, 100 i + 1, ..."""
    return TokenizedSequences.from_lists(
        ([100 * i + t for t in range(len(sequence))], [bool(flag) for flag in sequence])
        for i, sequence in enumerate(flags)
    )


BY_HAND = make_sequences(
    [0, 1, 1, 1, 1, 1, 1, 1, 1, 1],  # 4 | 4 | 2
    [0, 1, 0, 1],  # It just fits.
    [0, 0, 0, 0, 0, 1],  # Only the second segment has a target.
    [0, 0, 0, 0, 1],  # The target is the first token of the second segment.
    [0, 0, 0],  # It has no target.
    [],
    [0, 1, 1, 1, 1],  # It is one token too long, and the last token stays alone.
)


@pytest.mark.parametrize(
    ("too_long", "expected", "stats"),
    [
        (
            "truncate",
            [(0, 0, 4, 3), (1, 0, 4, 2), (6, 0, 4, 3)],
            TruncationStats(
                sequences=7,
                truncated=2,
                split=0,
                split_segments=0,
                dropped=0,
                untrained=4,
                segments=3,
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
                sequences=7,
                truncated=0,
                split=4,
                split_segments=9,
                dropped=0,
                untrained=6,
                segments=6,
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
                sequences=7,
                truncated=0,
                split=0,
                split_segments=0,
                dropped=4,
                untrained=2,
                segments=1,
                tokens=4,
                trained_tokens=2,
                cut_answers=4,
                cut_trained_tokens=15,
            ),
        ),
    ],
)
def test_by_hand(too_long, expected, stats):
    segments, counts = truncate_sequences(BY_HAND, 4, too_long)
    columns = (segments.sequence_index, segments.start, segments.length, segments.loss_tokens)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    assert counts == stats


def test_description():
    assert [truncate_sequences(BY_HAND, 4, too_long)[1].describe(4) for too_long in ("truncate", "split", "drop")] == [
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
def test_every_target_that_can_be_trained_is_in_one_segment(flags, seq_len, too_long):
    """Segments hold each (sequence, position) at most once, and `split` loses only the first token of each segment."""
    sequences = make_sequences(*flags)
    segments, stats = truncate_sequences(sequences, seq_len, too_long)
    covered = Counter()
    targets = set()
    for sequence, start, length, trained in zip(
        segments.sequence_index, segments.start, segments.length, segments.loss_tokens, strict=True
    ):
        assert 1 <= length <= seq_len
        positions = [(int(sequence), place) for place in range(start, start + length)]
        covered.update(positions)
        inside = [place for place in positions[1:] if sequences.loss_mask(place[0])[place[1]]]
        assert len(inside) == trained > 0, "nothing predicts a segment's first token"
        targets.update(inside)
    assert not covered or max(covered.values()) == 1
    assert list(segments.sequence_index) == sorted(segments.sequence_index)
    everything = {(i, t) for i, f in enumerate(flags) for t in range(1, len(f)) if f[t]}
    expected = {
        "truncate": {(i, t) for i, t in everything if t < seq_len},
        "split": {(i, t) for i, t in everything if t % seq_len},
        "drop": {(i, t) for i, t in everything if len(flags[i]) <= seq_len},
    }
    assert targets == expected[too_long]
    assert (stats.segments, stats.tokens, stats.trained_tokens) == (len(segments), covered.total(), len(targets))
    parts = [max(1, -(-len(f) // seq_len)) if too_long == "split" else 1 for f in flags]
    assert sum(parts) == stats.segments + stats.untrained + stats.dropped, "each segment is counted once"
