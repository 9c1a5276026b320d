"""If this fails, sequences run into each other."""

from __future__ import annotations

from qlora_dist.data.encode import Encoder
from qlora_dist.data.sequences import encode_rows
from qlora_dist.data.source import MessagesRow, TextRow


def test_stored_whole(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    rows = [
        TextRow("train.jsonl", 1, "the cat sat"),
        TextRow("train.jsonl", 1, ""),  # nothing but its end, which nothing predicts
        MessagesRow("train.jsonl", 2, [{"role": "user", "content": "the"}]),  # no answer
    ]
    sequences = encode_rows(rows, Encoder(tokenizer, "assistant"))
    assert len(sequences) == 3
    assert sequences.lengths[:2].tolist() == [4, 1]
    assert sequences.trained_lengths.tolist() == [3, 0, 0]
    assert [tokenizer.decode([t]) for t in sequences.tokens(0)] == ["the", " cat", " sat", "<|eos|>"]
    assert sequences.trained(0).tolist() == [False, True, True, True]
    assert tokenizer.decode(sequences.tokens(2)).startswith("<|im_start|>user\nthe<|im_end|>")
