"""If this fails, what the configuration says about data is not what is trained."""

from __future__ import annotations

import pytest

from qlora_dist.config import DataConfig
from qlora_dist.data.prepare import prepare
from qlora_dist.errors import UserError

ANSWERED = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}]}


def decoded(tokenizer, rows, index: int) -> tuple[str, list[str]]:
    """A row's text and its targets."""
    input_ids, labels, _ = rows.batch([index])
    return tokenizer.decode(input_ids[0]), [tokenizer.decode([t]) for t in labels[0].tolist() if t >= 0]


def test_two_files_and_evaluation(make_tokenizer, write_rows):
    tokenizer = make_tokenizer("chatml", pad_token="<|bos|>")
    train = [write_rows(ANSWERED, ANSWERED, name="a.jsonl"), write_rows(ANSWERED, name="b.jsonl")]
    held_out = write_rows({"text": "the dog"}, name="eval.jsonl")  # each data set has a format of its own
    prepared = prepare(DataConfig(train=train, eval=held_out, seq_len=30), tokenizer)

    turn = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat on<|im_end|>\n"
    assert len(prepared.train) == 2
    assert decoded(tokenizer, prepared.train, 0) == (
        turn * 2 + "<|bos|>" * 2,
        ["sat", " on", "<|im_end|>"] * 2,
    )
    assert decoded(tokenizer, prepared.train, 1) == (turn + "<|bos|>" * 16, ["sat", " on", "<|im_end|>"])
    assert prepared.eval is not None
    assert decoded(tokenizer, prepared.eval, 0) == ("the dog<|eos|>" + "<|bos|>" * 27, [" dog", "<|eos|>"])
    assert prepared.stats["train"].trained_tokens == 9
    assert prepared.stats["eval"].tokens == 3


def test_packing_mask_and_format_are_obeyed(make_tokenizer, write_rows):
    tokenizer = make_tokenizer("chatml")
    path = write_rows({**ANSWERED, "text": "the cat"}, {**ANSWERED, "text": "the dog"})
    one_each = prepare(DataConfig(train=[path], packing="none", mask="all", seq_len=30), tokenizer)
    assert (len(one_each.train), one_each.eval, set(one_each.stats)) == (2, None, {"train"})
    assert one_each.train.trained_tokens.tolist() == [13, 13]
    text = prepare(DataConfig(train=[path], format="text", seq_len=6), tokenizer)
    assert decoded(tokenizer, text.train, 0)[0] == "the cat<|eos|>the dog<|eos|>"


@pytest.mark.parametrize(
    ("special_tokens", "expected"),
    [({"pad_token": "<|bos|>"}, 0), ({"pad_token": "<|im_end|>"}, 3), ({}, 1), ({"eos_token": None}, 0)],
)
def test_padding_id(make_tokenizer, write_rows, special_tokens, expected):
    path = write_rows({"text": "the cat sat"})
    rows = prepare(DataConfig(train=[path], seq_len=9), make_tokenizer("none", **special_tokens)).train
    assert rows.batch([0]).input_ids[0, -1] == rows.pad_id == expected


def test_evaluation_without_a_trained_token_is_named(make_tokenizer, write_rows, refusal):
    train = write_rows({"text": "the cat"})
    held_out = write_rows({"messages": ANSWERED["messages"][:1]}, name="eval.jsonl")
    with pytest.raises(UserError) as error:
        prepare(DataConfig(train=[train], eval=held_out), make_tokenizer("chatml"))
    assert refusal(error.value).startswith("data.eval: none of the 1 rows")
