"""If this fails, the model is trained on the wrong tokens: on the user's text, or never on the end of a turn."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from qlora_dist.data.row_encoder import EncodedSequence, RowEncoder
from qlora_dist.data.source_row import BadRow, CompletionRow, MessagesRow, TextRow
from qlora_dist.errors import UserError

PLACE = "train.jsonl, line 7"

TURNS = [
    {"role": "system", "content": "sit"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "the log"},
]


def conversation(*messages: dict) -> MessagesRow:
    return MessagesRow(PLACE, list(messages))


def encode(encoder: RowEncoder, row) -> EncodedSequence:
    (encoded,) = encoder.encode([row])
    assert isinstance(encoded, EncodedSequence), encoded
    return encoded


def pieces(tokenizer, encoded) -> list[tuple[str, bool]]:
    """Return the text, cut where the loss mask changes."""
    runs: list[tuple[list[int], bool]] = []
    for token, flag in zip(encoded.tokens, encoded.loss_mask, strict=True):
        if not runs or runs[-1][1] != flag:
            runs.append(([], flag))
        runs[-1][0].append(token)
    return [(tokenizer.decode(tokens), flag) for tokens, flag in runs]


def test_a_tokenizer_whose_templates_have_names_and_no_default(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = {"rag": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    with pytest.raises(UserError, match="has only chat templates named rag, tool_use, and no default; write"):
        RowEncoder(tokenizer, "assistant").encode([conversation(*TURNS)])


def test_token_by_token(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    encoded = encode(RowEncoder(tokenizer, "assistant"), conversation(*TURNS[1:3]))
    shown = [(tokenizer.decode([t]), flag) for t, flag in zip(encoded.tokens, encoded.loss_mask, strict=True)]
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
    encoded = encode(RowEncoder(tokenizer, "assistant"), conversation(*TURNS))
    assert pieces(tokenizer, encoded) == [
        ("<|im_start|>system\nsit<|im_end|>\n<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n", False),
        ("sat on<|im_end|>", True),
        ("\n<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n", False),
        ("the log<|im_end|>", True),
        ("\n", False),
    ]


@pytest.mark.parametrize("mask", ["assistant", "all"])
@pytest.mark.parametrize("template", ["chatml", "llama", "plain", "marked"])
def test_tokens_equal_the_tokens_of_generation(make_tokenizer, template, mask):
    tokenizer = make_tokenizer(template)
    encoded = encode(RowEncoder(tokenizer, mask), conversation(*TURNS))
    assert encoded.tokens.tolist() == tokenizer.apply_chat_template(TURNS, return_dict=False)
    if mask == "all":
        assert encoded.loss_mask.tolist() == [True] * len(encoded.tokens)


def test_template_that_begins_with_bos_and_ends_with_the_turn(make_tokenizer):
    tokenizer = make_tokenizer("llama")
    encoded = encode(
        RowEncoder(tokenizer, "assistant"), conversation(TURNS[1], {"role": "assistant", "content": " sat "})
    )
    assert pieces(tokenizer, encoded) == [
        ("<|bos|><|im_start|>user\n\nthe cat<|im_end|><|im_start|>assistant\n\n", False),
        ("sat<|im_end|>", True),
    ]


def test_line_feed_is_trained_where_nothing_else_ends_the_turn(make_tokenizer):
    tokenizer = make_tokenizer("plain")
    encoded = encode(RowEncoder(tokenizer, "assistant"), conversation(*TURNS[1:4]))
    # ' sat' is one token with the prompt's last space. It lies across the answer's beginning and is trained.
    assert pieces(tokenizer, encoded) == [
        ("user: the cat\nassistant:", False),
        (" sat on\n", True),
        ("user: the dog\n", False),
    ]


def test_answer_that_starts_with_a_line_feed(make_tokenizer):
    """The line feed forms one token with the prompt's, and the row is valid nevertheless."""
    tokenizer = make_tokenizer("chatml")
    encoded = encode(
        RowEncoder(tokenizer, "assistant"), conversation(TURNS[1], {"role": "assistant", "content": "\nsat"})
    )
    assert tokenizer.decode(encoded.tokens).endswith("assistant\n\nsat<|im_end|>\n")
    assert pieces(tokenizer, encoded)[-2:] == [("\n\nsat<|im_end|>", True), ("\n", False)]


def test_white_space_inside_and_at_the_end_of_an_answer_is_trained(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    encoded = encode(
        RowEncoder(tokenizer, "assistant"), conversation(TURNS[1], {"role": "assistant", "content": "sat\n\non  \n"})
    )
    assert pieces(tokenizer, encoded)[1:] == [("sat\n\non  \n<|im_end|>", True), ("\n", False)]


def test_empty_answer_trains_the_end_of_turn(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    encoded = encode(RowEncoder(tokenizer, "assistant"), conversation(TURNS[1], {"role": "assistant", "content": ""}))
    assert pieces(tokenizer, encoded)[1:] == [("<|im_end|>", True), ("\n", False)]


def test_characters_of_several_tokens(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    encoded = encode(
        RowEncoder(tokenizer, "assistant"),
        conversation({"role": "user", "content": "漢🙂"}, {"role": "assistant", "content": "🙂字é"}),
    )
    assert pieces(tokenizer, encoded)[1:] == [("🙂字é<|im_end|>", True), ("\n", False)]


def test_conversation_without_an_answer_trains_nothing(make_tokenizer):
    encoded = encode(RowEncoder(make_tokenizer("chatml"), "assistant"), conversation(TURNS[1]))
    assert len(encoded.tokens)
    assert not any(encoded.loss_mask)


@pytest.mark.parametrize("mask", ["assistant", "all"])
def test_text_trains_everything_and_ends(make_tokenizer, mask):
    tokenizer = make_tokenizer("none")
    encoded = encode(RowEncoder(tokenizer, mask), TextRow(PLACE, "the cat sat"))
    assert [tokenizer.decode([t]) for t in encoded.tokens] == ["the", " cat", " sat", "<|eos|>"]
    assert encoded.loss_mask.tolist() == [True] * 4


def test_text_gets_one_end_from_a_tokenizer_that_writes_its_own(make_tokenizer):
    tokenizer = make_tokenizer("none")
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    encoded = encode(RowEncoder(tokenizer, "all"), TextRow(PLACE, "the cat"))
    assert tokenizer.decode(encoded.tokens) == "<|bos|>the cat<|eos|>"


def test_text_of_a_tokenizer_without_an_end(make_tokenizer):
    tokenizer = make_tokenizer("none", eos_token=None)
    encoded = encode(RowEncoder(tokenizer, "all"), TextRow(PLACE, "the cat"))
    assert tokenizer.decode(encoded.tokens) == "the cat"


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("the cat", " sat on", [("the cat", False), (" sat on<|eos|>", True)]),
        # ' sat' lies across the border and belongs to the completion.
        ("the cat ", "sat", [("the cat", False), (" sat<|eos|>", True)]),
        ("the cat", "", [("the cat", False), ("<|eos|>", True)]),
        ("", "the cat", [("the cat<|eos|>", True)]),
        ("", "", [("<|eos|>", True)]),
    ],
)
@pytest.mark.parametrize("mask", ["assistant", "last"])
def test_completion_is_trained_and_its_end(make_tokenizer, mask, prompt, completion, expected):
    tokenizer = make_tokenizer("none")
    encoded = encode(RowEncoder(tokenizer, mask), CompletionRow(PLACE, prompt, completion))
    assert pieces(tokenizer, encoded) == expected


def test_all_of_prompt_and_completion(make_tokenizer):
    tokenizer = make_tokenizer("none")
    encoded = encode(RowEncoder(tokenizer, "all"), CompletionRow(PLACE, "the cat", " sat"))
    assert pieces(tokenizer, encoded) == [("the cat sat<|eos|>", True)]


@pytest.mark.parametrize("completion", [" sat", ""])
def test_completion_of_a_tokenizer_that_writes_beginning_and_end(make_tokenizer, completion):
    """These tokens have the offsets of the first character, but they do not belong to the prompt."""
    tokenizer = make_tokenizer("none")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    encoded = encode(RowEncoder(tokenizer, "assistant"), CompletionRow(PLACE, "the cat", completion))
    assert pieces(tokenizer, encoded) == [("<|bos|>the cat", False), (completion + "<|eos|>", True)]


def test_completion_of_a_tokenizer_without_an_end(make_tokenizer):
    tokenizer = make_tokenizer("none", eos_token=None)
    encoder = RowEncoder(tokenizer, "assistant")
    assert pieces(tokenizer, encode(encoder, CompletionRow(PLACE, "the", " cat"))) == [("the", False), (" cat", True)]
    assert pieces(tokenizer, encode(encoder, CompletionRow(PLACE, "the", ""))) == [("the", False)]
    assert len(encode(encoder, CompletionRow(PLACE, "", "")).tokens) == 0


def test_rows_together_are_rows_alone(make_tokenizer):
    """Rows of different kinds, with bad ones among them, keep their order."""
    encoder = RowEncoder(make_tokenizer("alternating"), "assistant")
    rows = [
        TextRow("1", "the cat"),
        conversation(*TURNS[1:]),
        conversation(*TURNS),  # The template refuses system messages.
        CompletionRow("4", "the", " log"),
        conversation(*TURNS[1:3]),
        TextRow("6", ""),
    ]
    together = encoder.encode(rows)
    assert [type(item) for item in together] == [
        EncodedSequence,
        EncodedSequence,
        BadRow,
        EncodedSequence,
        EncodedSequence,
        EncodedSequence,
    ]
    for row, item in zip(rows, together, strict=True):
        (alone,) = encoder.encode([row])
        if isinstance(alone, EncodedSequence):
            assert np.array_equal(alone.tokens, item.tokens) and np.array_equal(alone.loss_mask, item.loss_mask)
            assert (item.tokens.dtype, item.loss_mask.dtype) == (np.int32, np.bool_)
        else:
            assert alone == item == BadRow(PLACE, alone.reason)
    assert encoder.encode([]) == []


def test_truncation_and_padding_left_on_by_others(make_tokenizer):
    tokenizer = make_tokenizer("chatml", pad_token="<|bos|>")
    expected = encode(RowEncoder(tokenizer, "assistant"), conversation(*TURNS))
    tokenizer(["the cat", "the"], padding=True, truncation=True, max_length=1)
    after = encode(RowEncoder(tokenizer, "assistant"), conversation(*TURNS))
    assert np.array_equal(after.tokens, expected.tokens) and np.array_equal(after.loss_mask, expected.loss_mask)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("unprompted", TURNS, "rewrites history (the prompt of message 5"),
        ("alternating", TURNS, "the chat template refuses the conversation (no system role)"),
        ("chatml", TURNS[2:], "starts with the assistant"),
        ("chatml", [{"role": "user", "content": "\ud83d"}], "half of a surrogate pair"),
        ("llama", [{"role": "user", "content": "a", "tool_calls": "x"}], "`tool_calls`, which the chat template"),
    ],
)
def test_bad_row_has_location_and_reason(make_tokenizer, refusal, template, messages, expected):
    (row,) = RowEncoder(make_tokenizer(template), "assistant").encode([conversation(*messages)])
    assert isinstance(row, BadRow)
    message = refusal(row.to_error())
    assert message.startswith("train.jsonl, line 7: ")
    assert expected in message


def test_no_chat_template(make_tokenizer, refusal):
    """It is an error of the configuration, not of a row. Rows without conversations need no template."""
    encoder = RowEncoder(make_tokenizer("none"), "assistant")
    assert encode(encoder, TextRow(PLACE, "the cat")).tokens.size
    with pytest.raises(UserError) as error:
        encoder.encode([TextRow(PLACE, "the cat"), conversation(*TURNS)])
    assert "the tokenizer has no chat template; write data.chat_template: chatml, alpaca" in refusal(error.value)


def test_template_of_the_tokenizer_that_does_not_compile(make_tokenizer, refusal):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "\n{% for m in messages %}"
    with pytest.raises(UserError) as error:
        RowEncoder(tokenizer, "assistant").encode([conversation(*TURNS)])
    assert "the tokenizer's is used: line 2 does not compile" in refusal(error.value)


def test_rewriting_template(make_tokenizer):
    """Its last answer has a thought before it, but an earlier answer has none."""
    tokenizer = make_tokenizer("rewriting")
    one = encode(RowEncoder(tokenizer, "assistant"), conversation(*TURNS[1:3]))
    assert pieces(tokenizer, one)[1] == ("<think></think>sat on<|im_end|>", True)
    encoded = encode(RowEncoder(tokenizer, "assistant"), conversation(*TURNS))
    assert [text for text, flag in pieces(tokenizer, encoded) if flag] == [
        "sat on<|im_end|>",
        "<think></think>the log<|im_end|>",
    ]
    last = encode(RowEncoder(tokenizer, "last"), conversation(*TURNS))
    assert [text for text, flag in pieces(tokenizer, last) if flag] == ["<think></think>the log<|im_end|>"]


class TestSlowTokenizer:
    """Slow tokenizer, which provides no token offsets."""

    @pytest.fixture
    def tokenizer(self, tmp_path):
        from transformers import CTRLTokenizer

        (tmp_path / "vocab.json").write_text('{"the": 0, "cat": 1, "c@@": 2, "at": 3, "<unk>": 4, "user:": 5}')
        (tmp_path / "merges.txt").write_text("#version\nt h\nth e</w>\nc a\nca t</w>\n")
        tokenizer = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        assert not tokenizer.is_fast
        return tokenizer

    def test_trains_all(self, tokenizer):
        encoder = RowEncoder(tokenizer, "all")
        for row in (conversation(TURNS[1]), TextRow(PLACE, "the cat"), CompletionRow(PLACE, "the", " cat")):
            assert encode(encoder, row).tokens.tolist() == [0, 1]
            assert encode(encoder, row).loss_mask.tolist() == [True, True]

    @pytest.mark.parametrize("row", [conversation(TURNS[1]), CompletionRow(PLACE, "the", " cat")])
    def test_cannot_mask(self, tokenizer, refusal, row):
        assert encode(RowEncoder(tokenizer, "assistant"), TextRow(PLACE, "the cat")).tokens.tolist() == [0, 1]
        with pytest.raises(UserError) as error:
            RowEncoder(tokenizer, "assistant").encode([row])
        assert "provides no token offsets" in refusal(error.value)

    def test_cannot_mask_a_message_with_all(self, tokenizer):
        with pytest.raises(UserError, match="provides no token offsets"):
            RowEncoder(tokenizer, "all").encode([conversation({**TURNS[1], "train": False})])

    def test_fingerprint(self, tokenizer, tmp_path):
        before = RowEncoder(tokenizer, "all").fingerprint()
        assert RowEncoder(tokenizer, "all").fingerprint() == before
        tokenizer.add_tokens(["dog"])
        assert RowEncoder(tokenizer, "all").fingerprint() != before


class TestMarks:
    """Templates with {% generation %} markers, whose marked spans are used as they are for every mask and flag."""

    def test_last(self, make_tokenizer):
        tokenizer = make_tokenizer("marked")
        encoded = encode(RowEncoder(tokenizer, "last"), conversation(*TURNS))
        assert [text for text, flag in pieces(tokenizer, encoded) if flag] == ["the log<|im_end|>"]

    def test_flags(self, make_tokenizer):
        tokenizer = make_tokenizer("marked")
        messages = [TURNS[0], {**TURNS[1], "train": True}, *TURNS[2:4], {**TURNS[4], "train": False}]
        encoded = encode(RowEncoder(tokenizer, "assistant"), conversation(*messages))
        assert [text for text, flag in pieces(tokenizer, encoded) if flag] == ["the cat<|im_end|>", "sat on<|im_end|>"]

    def test_no_answer_is_trained(self, make_tokenizer):
        messages = [{**message, "train": False} for message in TURNS]
        assert not any(encode(RowEncoder(make_tokenizer("marked"), "assistant"), conversation(*messages)).loss_mask)

    def test_marks_that_are_not_one_for_each_answer(self, make_tokenizer):
        tokenizer = make_tokenizer("marked")
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "{{ m['content'] }}<|im_end|>{% endgeneration %}",
            "{{ m['content'] }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}",
        )
        encoded = encode(RowEncoder(tokenizer, "assistant"), conversation(*TURNS))
        assert [text for text, flag in pieces(tokenizer, encoded) if flag] == ["sat on<|im_end|>", "the log<|im_end|>"]
        (row,) = RowEncoder(tokenizer, "last").encode([conversation(*TURNS)])
        assert isinstance(row, BadRow)
        assert "marks 4 passages for 2 messages of the assistant" in row.reason


def test_sent_to_another_process(make_tokenizer):
    encoder = RowEncoder(make_tokenizer("chatml"), "last", "chatml")
    sent = pickle.loads(pickle.dumps(encoder))
    assert sent.fingerprint() == encoder.fingerprint()
    assert (
        encode(sent, conversation(*TURNS)).loss_mask.tolist()
        == encode(encoder, conversation(*TURNS)).loss_mask.tolist()
    )
