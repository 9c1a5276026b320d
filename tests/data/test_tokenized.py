"""If this fails, sequences are mixed up, or a rank reads all tokens to get their lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.data.tokenized import FlatSequences, SequenceWriter, TokenizedSequences

Pairs = list[tuple[list[int], list[bool]]]


def pairs() -> st.SearchStrategy[Pairs]:
    """Draw tokens and flags of sequences of any length."""
    token = st.tuples(st.integers(0, 2**31 - 1), st.booleans())
    return st.lists(st.lists(token, max_size=9).map(lambda s: ([t for t, _ in s], [f for _, f in s])), max_size=12)


def contents(sequences: TokenizedSequences) -> Pairs:
    return [(sequences.tokens(i).tolist(), sequences.loss_mask(i).tolist()) for i in range(len(sequences))]


def expected(pairs: Pairs) -> Pairs:
    return [(tokens, [False, *flags[1:]] if flags else []) for tokens, flags in pairs]


def write(path: Path, parts: list[Pairs], batch_tokens: int) -> TokenizedSequences:
    with SequenceWriter(path, batch_tokens) as writer:
        for part in parts:
            writer.append(
                FlatSequences.from_pairs([(np.array(t, dtype=np.int32), np.array(f, dtype=np.bool_)) for t, f in part])
            )
    return TokenizedSequences.open(path)


@settings(deadline=None)
@given(parts=st.lists(pairs(), max_size=4), batch_tokens=st.integers(1, 40))
def test_reads_the_sequences_that_were_written(tmp_path_factory, parts, batch_tokens):
    everything = [pair for part in parts for pair in part]
    written = write(tmp_path_factory.mktemp("sequences") / "a.arrow", parts, batch_tokens)
    for sequences in (written, TokenizedSequences.from_lists(everything)):
        assert contents(sequences) == expected(everything)
        assert sequences.lengths.tolist() == [len(tokens) for tokens, _ in everything]
        assert sequences.loss_token_counts.tolist() == [sum(flags[1:]) for _, flags in everything]
        for array in (sequences.lengths, sequences.loss_token_counts):
            assert array.dtype == np.int64
    with pytest.raises(IndexError):
        written.tokens(len(everything))
    with pytest.raises(IndexError):
        written.loss_mask(-1)


def test_memory_is_bounded_when_writing_and_untouched_when_reading(tmp_path):
    many = [([7] * 1000, [True] * 1000)] * 100
    before = pa.total_allocated_bytes()
    sequences = write(tmp_path / "a.arrow", [many] * 10, batch_tokens=50_000)
    assert [batch.num_rows for batch in sequences.batches] == [100] * 10
    # The arrays are read-only views of the mapped file.
    assert pa.total_allocated_bytes() - before < 100_000
    first = sequences.tokens(0)
    assert (first.dtype, sequences.loss_mask(0).dtype) == (np.int32, np.bool_)
    assert np.shares_memory(first, sequences.batches[0].column("tokens").values.to_numpy())
    assert not first.flags.writeable
    assert not sequences.loss_mask(0).flags.writeable


def test_batches_of_two_files_are_one(tmp_path):
    """Slices of a batch work too."""
    a = write(tmp_path / "a.arrow", [[([1, 2], [0, 1]), ([3], [1])]], 1)
    b = write(tmp_path / "b.arrow", [[([4, 5, 6], [1, 1, 0])]], 1)
    joined = TokenizedSequences([a.batches[0].slice(1), *b.batches])
    assert contents(joined) == [([3], [False]), ([4, 5, 6], [False, True, False])]
    assert joined.loss_token_counts.tolist() == [0, 1]


def test_a_truncated_file_is_not_opened(tmp_path):
    path = tmp_path / "a.arrow"
    write(path, [[([1, 2], [0, 1])]], 1)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(pa.ArrowInvalid):
        TokenizedSequences.open(path)
