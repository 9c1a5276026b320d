"""If this fails, long rows are cut wrongly, or the numbers told to the user about the data are not true."""

from __future__ import annotations

import pytest

from qlora_dist.data.encode import Encoder
from qlora_dist.data.row import MessagesRow, TextRow
from qlora_dist.data.sequences import Stats, encode_rows
from qlora_dist.errors import UserError


def text(content: str) -> TextRow:
    return TextRow("train.jsonl, line 1", content)


def test_cut_counted_and_stored(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    rows = [
        text("the cat sat on"),  # with its end 5 tokens: cut to 4, of which 3 are targets
        text("the cat"),  # 3 tokens, 2 targets
        text(""),  # nothing but its end, which nothing predicts
        MessagesRow("train.jsonl, line 2", [{"role": "user", "content": "the"}]),  # no answer
        text("the cat sat"),  # exactly 4 tokens: not cut
    ]
    sequences, stats = encode_rows(rows, Encoder(tokenizer, "assistant"), seq_len=4)
    assert stats == Stats(rows=5, untrained_rows=2, truncated_rows=1, tokens=11, trained_tokens=8)
    assert stats.sequences == 3
    assert sequences.lengths.tolist() == [4, 3, 4]
    assert [tokenizer.decode([t]) for t in sequences.tokens] == [
        *("the", " cat", " sat", " on"),
        *("the", " cat", "<|eos|>"),
        *("the", " cat", " sat", "<|eos|>"),
    ]
    assert sequences.trained.tolist() == [
        *(False, True, True, True),
        *(False, True, True),
        *(False, True, True, True),
    ]


def test_answer_behind_the_cut_is_dropped(make_tokenizer):
    """The prompt is 10 tokens: at 10 the answer is cut away whole, at 11 its first token is left."""
    row = MessagesRow(
        "train.jsonl, line 2", [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}]
    )
    encoder = Encoder(make_tokenizer("chatml"), "assistant")
    _, stats = encode_rows([row, text("the cat")], encoder, seq_len=10)
    assert (stats.untrained_rows, stats.truncated_rows, stats.trained_tokens) == (1, 0, 2)
    sequences, stats = encode_rows([row], encoder, seq_len=11)
    assert (stats.untrained_rows, stats.truncated_rows, stats.trained_tokens) == (0, 1, 1)
    assert sequences.trained.tolist() == [False] * 10 + [True]


def test_nothing_left(make_tokenizer, refusal):
    with pytest.raises(UserError) as error:
        encode_rows([text("the cat")] * 2, Encoder(make_tokenizer("chatml"), "all"), seq_len=1, name="data.eval")
    assert "data.eval: none of the 2 rows has a token to train within data.seq_len: 1" in refusal(error.value)
