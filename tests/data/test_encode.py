"""If this fails, the model is trained on the wrong tokens: on the user's words, or never on when to stop."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from qlora_dist.data.encode import Encoder
from qlora_dist.data.row import MessagesRow, TextRow
from qlora_dist.errors import UserError

TURNS = [
    {"role": "system", "content": "sit"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "the log"},
]


def conversation(*messages: dict) -> MessagesRow:
    return MessagesRow("train.jsonl, line 7", list(messages))


def pieces(tokenizer, encoded) -> list[tuple[str, bool]]:
    """The text cut where the flag changes."""
    runs: list[tuple[list[int], bool]] = []
    for token, flag in zip(encoded.tokens, encoded.trained, strict=True):
        if not runs or runs[-1][1] != flag:
            runs.append(([], flag))
        runs[-1][0].append(token)
    return [(tokenizer.decode(tokens), flag) for tokens, flag in runs]


def test_token_by_token(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    encoded = Encoder(tokenizer, "assistant")(conversation(*TURNS[1:3]))
    shown = [(tokenizer.decode([t]), flag) for t, flag in zip(encoded.tokens, encoded.trained, strict=True)]
    assert shown == [
        ("<|im_start|>", False),
        ("user", False),
        ("\n", False),
        ("the", False),
        (" cat", False),
        ("<|im_end|>", False),
        ("\n", False),
        ("<|im_start|>", False),
        ("assistant", False),
        ("\n", False),
        ("sat", True),
        (" on", True),
        ("<|im_end|>", True),
        ("\n", False),
    ]


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_every_answer_of_a_long_conversation_with_and_without_markers(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    encoded = Encoder(tokenizer, "assistant")(conversation(*TURNS))
    assert pieces(tokenizer, encoded) == [
        (
            "<|im_start|>system\nsit<|im_end|>\n<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("sat on<|im_end|>", True),
        ("\n<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n", False),
        ("the log<|im_end|>", True),
        ("\n", False),
    ]


@pytest.mark.parametrize("mask", ["assistant", "all"])
@pytest.mark.parametrize("template", ["chatml", "llama", "plain", "marked"])
def test_tokens_are_those_generation_sees(make_tokenizer, template, mask):
    tokenizer = make_tokenizer(template)
    encoded = Encoder(tokenizer, mask)(conversation(*TURNS))
    assert encoded.tokens == tokenizer.apply_chat_template(TURNS, return_dict=False)
    if mask == "all":
        assert encoded.trained == [True] * len(encoded.tokens)


def test_template_that_begins_with_bos_and_ends_with_the_turn(make_tokenizer):
    tokenizer = make_tokenizer("llama")
    encoded = Encoder(tokenizer, "assistant")(conversation(TURNS[1], {"role": "assistant", "content": " sat "}))
    assert pieces(tokenizer, encoded) == [
        ("<|bos|><|im_start|>user\n\nthe cat<|im_end|><|im_start|>assistant\n\n", False),
        ("sat<|im_end|>", True),
    ]


def test_line_feed_is_trained_where_nothing_else_ends_the_turn(make_tokenizer):
    tokenizer = make_tokenizer("plain")
    encoded = Encoder(tokenizer, "assistant")(conversation(*TURNS[1:4]))
    # ' sat' is one token with the prompt's last space: it straddles the answer's beginning and is trained
    assert pieces(tokenizer, encoded) == [
        ("user: the cat\nassistant:", False),
        (" sat on\n", True),
        ("user: the dog\n", False),
    ]


def test_answer_that_starts_with_a_line_feed(make_tokenizer):
    """It becomes one token with the prompt's; the row is good all the same."""
    tokenizer = make_tokenizer("chatml")
    encoded = Encoder(tokenizer, "assistant")(
        conversation(TURNS[1], {"role": "assistant", "content": "\nsat"}),
    )
    assert tokenizer.decode(encoded.tokens).endswith("assistant\n\nsat<|im_end|>\n")
    assert pieces(tokenizer, encoded)[-2:] == [("\n\nsat<|im_end|>", True), ("\n", False)]


def test_white_space_inside_and_at_the_end_of_an_answer_is_trained(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    encoded = Encoder(tokenizer, "assistant")(
        conversation(TURNS[1], {"role": "assistant", "content": "sat\n\non  \n"}),
    )
    assert pieces(tokenizer, encoded)[1:] == [("sat\n\non  \n<|im_end|>", True), ("\n", False)]


def test_empty_answer_trains_the_end_of_turn(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    encoded = Encoder(tokenizer, "assistant")(conversation(TURNS[1], {"role": "assistant", "content": ""}))
    assert pieces(tokenizer, encoded)[1:] == [("<|im_end|>", True), ("\n", False)]


def test_characters_of_several_tokens(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    encoded = Encoder(tokenizer, "assistant")(
        conversation({"role": "user", "content": "漢🙂"}, {"role": "assistant", "content": "🙂字é"})
    )
    assert pieces(tokenizer, encoded)[1:] == [("🙂字é<|im_end|>", True), ("\n", False)]


def test_conversation_without_an_answer_trains_nothing(make_tokenizer):
    encoded = Encoder(make_tokenizer("chatml"), "assistant")(conversation(TURNS[1]))
    assert encoded.tokens
    assert not any(encoded.trained)


@pytest.mark.parametrize("mask", ["assistant", "all"])
def test_text_trains_everything_and_ends(make_tokenizer, mask):
    tokenizer = make_tokenizer("none")
    encoded = Encoder(tokenizer, mask)(TextRow("train.jsonl, line 1", "the cat sat"))
    assert [tokenizer.decode([t]) for t in encoded.tokens] == ["the", " cat", " sat", "<|eos|>"]
    assert encoded.trained == [True] * 4


def test_text_gets_one_end_from_a_tokenizer_that_writes_its_own(make_tokenizer):
    tokenizer = make_tokenizer("none")
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    encoded = Encoder(tokenizer, "all")(TextRow("train.jsonl, line 1", "the cat"))
    assert tokenizer.decode(encoded.tokens) == "<|bos|>the cat<|eos|>"


def test_text_of_a_tokenizer_without_an_end(make_tokenizer):
    tokenizer = make_tokenizer("none", eos_token=None)
    encoded = Encoder(tokenizer, "all")(TextRow("train.jsonl, line 1", "the cat"))
    assert tokenizer.decode(encoded.tokens) == "the cat"


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("none", TURNS, "this tokenizer has no chat template; use rows with `text`"),
        ("rewriting", TURNS, "rewrites history (an earlier turn of message 3"),
        ("unprompted", TURNS, "rewrites history (the prompt of message 3"),
        ("alternating", TURNS, "the chat template refuses the conversation (no system role)"),
        ("chatml", TURNS[2:], "starts with the assistant"),
    ],
)
def test_refused_with_file_and_line(make_tokenizer, refusal, template, messages, expected):
    with pytest.raises(UserError) as error:
        Encoder(make_tokenizer(template), "assistant")(conversation(*messages))
    message = refusal(error.value)
    assert message.startswith("train.jsonl, line 7: ")
    assert expected in message


def test_rewriting_template_takes_one_answer_and_what_the_message_recommends(make_tokenizer):
    tokenizer = make_tokenizer("rewriting")
    encoded = Encoder(tokenizer, "assistant")(conversation(*TURNS[1:3]))
    assert pieces(tokenizer, encoded)[1] == ("<think></think>sat on<|im_end|>", True)
    assert all(Encoder(tokenizer, "all")(conversation(*TURNS)).trained)
