"""If this fails, a base model is trained on conversations in an unexpected form, or never learns to end."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from qlora_dist.data.row_encoder import EncodedSequence, RowEncoder
from qlora_dist.data.source_row import BadRow, MessagesRow
from qlora_dist.data.tokenizer import SHIPPED_TEMPLATES
from qlora_dist.errors import UserError
from tests.helpers.published_tokenizers import make_tokenizer as published_tokenizer

SYSTEM = {"role": "system", "content": "sit"}
CAT, SAT = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}
DOG, LOG = {"role": "user", "content": "the dog"}, {"role": "assistant", "content": "the log"}


def pieces(tokenizer, name: str, *messages: dict) -> list[tuple[str, bool]]:
    """Return the text, cut where the loss mask changes."""
    (encoded,) = RowEncoder(tokenizer, "assistant", name).encode([MessagesRow("train.jsonl, line 7", list(messages))])
    assert isinstance(encoded, EncodedSequence), encoded
    runs: list[tuple[list[int], bool]] = []
    for token, flag in zip(encoded.tokens.tolist(), encoded.loss_mask.tolist(), strict=True):
        if not runs or runs[-1][1] != flag:
            runs.append(([], flag))
        runs[-1][0].append(token)
    return [(tokenizer.decode(tokens), flag) for tokens, flag in runs]


def test_chatml(make_tokenizer):
    assert pieces(make_tokenizer("none"), "chatml", SYSTEM, CAT, SAT, DOG, LOG) == [
        ("<|im_start|>system\nsit<|im_end|>\n<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n", False),
        ("sat on<|im_end|>", True),
        ("\n<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n", False),
        ("the log<|im_end|>", True),
        ("\n", False),
    ]


def test_alpaca(make_tokenizer):
    first = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nthe cat\n\n### Response:\n"
    )
    expected = [
        (first, False),
        ("sat on<|eos|>", True),
        ("\n\n### Instruction:\nthe dog\n\n### Response:\n", False),
        ("the log<|eos|>", True),
    ]
    tokenizer = make_tokenizer("none")
    assert pieces(tokenizer, "alpaca", CAT, SAT, DOG, LOG) == expected
    assert pieces(tokenizer, "alpaca", CAT, SAT) == expected[:2]
    assert pieces(tokenizer, "alpaca", SYSTEM, CAT, SAT)[0] == (
        "sit\n\n### Instruction:\nthe cat\n\n### Response:\n",
        False,
    )


def test_guanaco(make_tokenizer):
    """Generation stops at the ### that ends an earlier answer."""
    tokenizer = make_tokenizer("none")
    assert pieces(tokenizer, "guanaco", CAT, SAT, DOG, LOG) == [
        ("### Human: the cat### Assistant:", False),
        (" sat on###", True),
        (" Human: the dog### Assistant:", False),
        (" the log<|eos|>", True),
    ]
    assert pieces(tokenizer, "guanaco", SYSTEM, CAT, DOG, SAT) == [
        ("sit\n### Human: the cat### Human: the dog### Assistant:", False),
        (" sat on<|eos|>", True),
    ]


@pytest.mark.parametrize("name", SHIPPED_TEMPLATES)
def test_generation_gets_the_same_prompt_as_training(make_tokenizer, name):
    """The prompt of generation equals the text before the answer in training."""
    tokenizer = make_tokenizer("none")
    tokenizer.chat_template = RowEncoder(tokenizer, "assistant", name)._template
    for messages in ([CAT, SAT], [SYSTEM, CAT, SAT, DOG, LOG], [CAT, DOG, SAT]):
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = pieces(tokenizer, name, *messages)
        assert "".join(text for text, _ in whole).startswith(prompt)
        answer = whole[-2] if name == "chatml" else whole[-1]
        assert answer[1] and prompt + answer[0] == "".join(text for text, _ in whole).removesuffix("\n")


@pytest.mark.parametrize("name", SHIPPED_TEMPLATES)
def test_begins_like_the_tokenizers_texts(make_tokenizer, name):
    tokenizer = make_tokenizer("none", bos_token="<|bos|>")
    assert not pieces(tokenizer, name, CAT, SAT)[0][0].startswith("<|bos|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    text = pieces(tokenizer, name, CAT, SAT)[0][0]
    assert text.startswith("<|bos|>") and text.count("<|bos|>") == 1


@pytest.mark.parametrize("name", SHIPPED_TEMPLATES)
@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "the mat"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "user"},
    ],
)
def test_unsupported_conversations_are_refused(make_tokenizer, name, message):
    encoder = RowEncoder(make_tokenizer("none"), "all", name)
    (row,) = encoder.encode([MessagesRow("train.jsonl, line 7", [CAT, message, SAT])])
    assert isinstance(row, BadRow)
    assert row.reason.startswith("the chat template refuses the conversation (")


def test_chatml_without_its_end(refusal):
    """Generation cannot stop at an <|im_end|> of several tokens."""
    with pytest.raises(UserError) as error:
        RowEncoder(published_tokenizer("llama-3"), "assistant", "chatml")
    assert "the tokenizer has no token <|im_end|>" in refusal(error.value)


@pytest.mark.parametrize("name", ["alpaca", "guanaco"])
def test_no_end_of_sequence(make_tokenizer, refusal, name):
    with pytest.raises(UserError) as error:
        RowEncoder(make_tokenizer("none", eos_token=None), "assistant", name)
    assert f"{name}: the tokenizer has no end-of-sequence token" in refusal(error.value)


def test_file(make_tokenizer, tmp_path):
    """It replaces the tokenizer's own template."""
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}({{ m.role }}) {{ m.content }}<|im_end|>{% endfor %}", encoding="utf-8")
    assert pieces(make_tokenizer("chatml"), str(path), CAT, {**SAT, "train": False}) == [
        ("(user) the cat<|im_end|>(assistant) sat on<|im_end|>", False)
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file; write chatml, alpaca, guanaco or the path of a Jinja file"),
        (b"\xff", "cannot be read (not UTF-8)"),
        (b"\n{% for m in messages %}", "line 2 does not compile"),
        (b"{{ messages | nonsense }}", "line 1 does not compile (No filter named 'nonsense'.)"),
    ],
)
def test_file_that_cannot_be_used(make_tokenizer, tmp_path, refusal, content, expected):
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        RowEncoder(make_tokenizer("chatml"), "assistant", str(path))
    message = refusal(error.value)
    assert message.startswith(f"data.chat_template: {path}: ")
    assert expected in message


def test_folder_is_not_a_file(make_tokenizer, tmp_path, refusal):
    with pytest.raises(UserError) as error:
        RowEncoder(make_tokenizer("chatml"), "assistant", str(tmp_path))
    assert "cannot be read (Is a directory)" in refusal(error.value)
