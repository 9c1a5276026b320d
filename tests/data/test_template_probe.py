"""If this fails, a misspelt role or a thought is silently missing from training."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_dist.data.row_encoder import EncodedSequence, MaskMode, RowEncoder
from qlora_dist.data.source_row import BadRow, MessagesRow
from tests.helpers.published_tokenizers import FAMILIES, make_tokenizer

CAT, SAT = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}


def encode_messages(
    name: str, *messages: dict[str, Any], mask: MaskMode = "assistant", template: str | None = None
) -> EncodedSequence:
    (row,) = RowEncoder(_tokenizer(name, template), mask).encode([MessagesRow("1", list(messages))])
    assert isinstance(row, EncodedSequence), row
    return row


def encode_refusal(
    name: str, *messages: dict[str, Any], mask: MaskMode = "assistant", template: str | None = None
) -> str:
    (row,) = RowEncoder(_tokenizer(name, template), mask).encode([MessagesRow("1", list(messages))])
    assert isinstance(row, BadRow), row
    assert "; " in row.reason and "\n" not in row.reason
    return row.reason


def _tokenizer(name: str, template: str | None) -> Any:
    tokenizer = make_tokenizer(name)
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mask", ["assistant", "last", "all"])
def test_a_misspelt_role_is_refused(name, mask):
    """ChatML and Llama 3 would write it unchanged, and the answer would never be trained."""
    misspelt = SAT | {"role": "asistant"}
    assert encode_refusal(name, CAT, misspelt, mask=mask) == (
        "message 2 has the unknown role `asistant`; write assistant, or give the message a `train` of true or false"
    )
    assert encode_refusal(name, CAT, SAT, CAT, misspelt, mask=mask).startswith(
        "message 4 has the unknown role `asistant`"
    )


@pytest.mark.parametrize(
    ("role", "remedy"),
    [
        ("model", "write assistant"),
        ("gpt", "write assistant"),
        ("human", "write user"),
        ("User", "write user"),
        ("critic", "write one of system, developer, user, assistant, tool, function, ipython, environment"),
        ("", "write one of system, "),
    ],
)
def test_other_roles_and_their_remedies(role, remedy):
    assert f"unknown role `{role}`; {remedy}" in encode_refusal("chatml", CAT, SAT, CAT | {"role": role})


def test_a_custom_role_with_a_train_flag():
    critic = {"role": "critic", "content": "a thought"}
    row = encode_messages("chatml", CAT, SAT, critic | {"train": False})
    tokenizer = make_tokenizer("chatml")
    assert tokenizer.decode(row.tokens).endswith("<|im_start|>critic\na thought<|im_end|>\n")
    assert tokenizer.decode(row.tokens[row.loss_mask]) == "sat on<|im_end|>"
    row = encode_messages("chatml", CAT, critic | {"train": True})
    assert tokenizer.decode(row.tokens[row.loss_mask]) == "a thought<|im_end|>"


def test_a_role_that_the_template_names():
    template = make_tokenizer("chatml").chat_template + "{% if messages[0].role in ['context', 'x'] %}{% endif %}"
    assert "the unknown role `context`" in encode_refusal("chatml", CAT | {"role": "context"}, SAT)
    encode_messages("chatml", CAT | {"role": "context"}, CAT, SAT, template=template)


WRITES_SOME = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant', 'tool'] %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("role", ["system", "developer", "ipython"])
@pytest.mark.parametrize("mask", ["assistant", "all"])
def test_a_role_that_the_template_leaves_out_is_refused(role, mask):
    assert encode_refusal(
        "chatml", {"role": role, "content": "be brief"}, CAT, SAT, mask=mask, template=WRITES_SOME
    ) == (
        f"message 1 has the role `{role}`, and the chat template writes nothing for it; give it a role that the "
        "template writes, or use another template"
    )
    encode_messages("chatml", {"role": role, "content": ""}, CAT, SAT, mask=mask, template=WRITES_SOME)
    encode_messages("chatml", CAT, SAT, {"role": "tool", "content": "3"}, SAT, mask=mask, template=WRITES_SOME)


THINKING = ["reasoning_content", "reasoning", "thinking"]


@pytest.mark.parametrize("field", THINKING)
@pytest.mark.parametrize("name", ["chatml", "llama-3.1", "mistral-nemo", "gemma"])
def test_thoughts_that_are_not_written_are_refused(name, field):
    thinking = SAT | {field: "a thought"}
    assert encode_refusal(name, CAT, thinking) == (
        f"message 2 has a `{field}`, which the chat template does not write; use a template that does, write the "
        "thought into `content`, or take it out"
    )
    assert "message 2 has a `" in encode_refusal(name, CAT, thinking, CAT, SAT)
    assert "message 2 has a `" in encode_refusal(name, CAT, thinking | {"train": False}, CAT, SAT)
    encode_messages(name, CAT, SAT | {field: " "})
    encode_messages(name, CAT, SAT | {field: None})


@pytest.mark.parametrize("field", THINKING)
def test_thoughts_that_are_written_where_a_model_sees_them(field):
    """Qwen 3 omits the thoughts of earlier turns, as at inference, so nothing is lost."""
    tokenizer = make_tokenizer("qwen3")
    thinking = SAT | {field: "a thought"}
    row = encode_messages("qwen3", CAT, thinking, CAT, SAT)
    assert "a thought" not in tokenizer.decode(row.tokens)
    row = encode_messages("qwen3", CAT, SAT, CAT, thinking)
    assert tokenizer.decode(row.tokens[row.loss_mask]).endswith("<think>\na thought\n</think>\n\nsat on<|im_end|>")


def test_thoughts_that_are_written_of_some_answers():
    """A template may write thoughts only before calls, so each row is checked then."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.reasoning_content }}{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    thinking = SAT | {"reasoning_content": "a thought"}
    call = {"name": "f", "arguments": {}}
    assert "message 2 has a `" in encode_refusal("chatml", CAT, thinking, template=template)
    encode_messages("chatml", CAT, thinking | {"tool_calls": [call]}, template=template)
