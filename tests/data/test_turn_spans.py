"""If this fails, an answer is trained in part, or the user's text is trained."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.data import turn_spans
from qlora_dist.data.chat_renderer import ChatRenderer
from qlora_dist.data.row_encoder import EncodedSequence, MaskMode, RowEncoder
from qlora_dist.data.source_row import BadRow, MessagesRow
from tests.helpers.published_tokenizers import FAMILIES, make_tokenizer

published = functools.cache(make_tokenizer)


@functools.cache
def encoder(name: str, mask: MaskMode) -> RowEncoder:
    return RowEncoder(published(name), mask)


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "what", "arguments": {"role": "cat"}}}
TEXTS = st.sampled_from(["a", "the cat", " sat \n", "\n\nfoo", "字🙂", "user\n", "assistant", "🙂"])
ANSWERS = TEXTS | TEXTS.map(lambda text: f"<think>\nwho?\n</think>\n\n{text}")


@st.composite
def conversations(draw: Any, *, tools: bool, train: tuple = (None, None, None, False, True)) -> list[dict[str, Any]]:
    flags = st.sampled_from(train)
    messages = []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        if tools and draw(st.integers(0, 3)) == 0:
            messages.append({"role": "assistant", "content": "", "tool_calls": [CALL], "train": draw(flags)})
            messages.append({"role": "tool", "content": draw(TEXTS), "tool_call_id": "abcdefghi"})
        messages.append({"role": "assistant", "content": draw(ANSWERS), "train": draw(flags)})
    return messages


def reference_encoding(
    name: str, messages: list[dict[str, Any]], mask: MaskMode
) -> tuple[list[int], list[bool]] | None:
    """Return the encoding by a simple definition; None if the prompt is not a prefix of the conversation.

    Each answer begins at the end of its prompt, and ends at the first token that ends turns.
    """
    tokenizer, end = published(name), FAMILIES[name].end
    plain = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    text = tokenizer.apply_chat_template(plain, tokenize=False)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    turn_spans = []
    for index in answers:
        train = messages[index]["train"]
        if train is False or (train is None and mask == "last" and index != answers[-1]):
            continue
        prompt = tokenizer.apply_chat_template(plain[:index], tokenize=False, add_generation_prompt=True)
        if not text.startswith(prompt):
            return None
        turn_spans.append((len(prompt), text.index(end, len(prompt)) + len(end)))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = [any(a < stop and b > start for start, stop in turn_spans) for a, b in encoding["offset_mapping"]]
    return encoding["input_ids"], trained


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), mask=st.sampled_from(["assistant", "last"]))
def test_equals_the_reference(name, data, mask):
    """This includes Qwen 3, which writes earlier answers differently from the last one."""
    messages = data.draw(conversations(tools="tool_calls" in published(name).chat_template))
    (encoded,) = encoder(name, mask).encode([MessagesRow("train.jsonl, line 7", messages)])
    expected = reference_encoding(name, messages, mask)
    if expected is None:
        assert isinstance(encoded, BadRow) and "rewrites history (the prompt of message" in encoded.reason
    else:
        assert isinstance(encoded, EncodedSequence), encoded
        assert (encoded.tokens.tolist(), encoded.loss_mask.tolist()) == expected


@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral", "gemma"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_masked_answers_are_the_complement_of_trained_ones(name, data):
    messages = data.draw(conversations(tools=False, train=(False, True)))
    others = [{**message, "train": not message.get("train")} for message in messages]
    (answers,) = encoder(name, "assistant").encode([MessagesRow("1", messages)])
    (rest,) = encoder(name, "all").encode([MessagesRow("1", others)])
    assert isinstance(answers, EncodedSequence) and isinstance(rest, EncodedSequence)
    assert (answers.loss_mask != rest.loss_mask).all()


PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TRIMMED = PLAIN.replace("m.content", "m.content | trim")
# The next turn writes the end of a turn.
LATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}"
)
AWKWARD = st.lists(
    st.sampled_from([">", "\n", " ", "<|im_end|>", "user", "a", "</think>", "<think>\n\n</think>\n\n", "</s>"]),
    max_size=3,
).map("".join)


@functools.cache
def make_template_encoder(template: str) -> RowEncoder:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = template
    return RowEncoder(tokenizer, "assistant")


@pytest.mark.parametrize("name", ["plain", "trimmed", "late", "qwen3", "mistral"])
@settings(max_examples=100, deadline=None)
@given(contents=st.lists(AWKWARD, min_size=2, max_size=8))
def test_saved_renderings_change_nothing(name, contents):
    roles = itertools.cycle(["user", "assistant"])
    row = MessagesRow("1", [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)])
    own = {"plain": PLAIN, "trimmed": TRIMMED, "late": LATE}
    made = make_template_encoder(own[name]) if name in own else encoder(name, "assistant")
    (saved,) = made.encode([row])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turn_spans._TurnFinder, "_end_by_affixes", lambda *_: None)
        (rendered,) = made.encode([row])
    assert isinstance(saved, EncodedSequence) and isinstance(rendered, EncodedSequence)
    assert saved.loss_mask.tolist() == rendered.loss_mask.tolist()


# The end of the last turn differs from the others, as in GPT-OSS.
ENDS_OTHERWISE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# History keeps nothing of an answer.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role != 'assistant' or loop.last %}{{ m.content }}"
    "{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# History keeps the first word.
SHORTENS = FORGETS.replace("{% endif %}<|im_end|>", "{% else %}{{ m.content.split()[0] }}{% endif %}<|im_end|>", 1)


@pytest.mark.parametrize("template", [ENDS_OTHERWISE, FORGETS, SHORTENS])
def test_unsupported_history(template):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = template
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat on"},
        {"role": "user", "content": "the dog"},
        {"role": "assistant", "content": "the log"},
    ]
    (row,) = RowEncoder(tokenizer, "assistant").encode([MessagesRow("train.jsonl, line 7", messages)])
    assert isinstance(row, BadRow)
    assert "rewrites history (an earlier turn of message 2 changes with what follows)" in row.reason
    (last,) = RowEncoder(tokenizer, "last").encode([MessagesRow("train.jsonl, line 7", messages)])
    assert isinstance(last, EncodedSequence)
    ended = tokenizer.decode(last.tokens[last.loss_mask])
    assert ended == "the log<|endoftext|>" if template is ENDS_OTHERWISE else ended == "the log<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral", "qwen3"])
def test_renders_the_whole_once_and_each_prompt(name, monkeypatch):
    """Twice as many renderings would take a tenth of the time of encoding long conversations."""
    rendered: list[int] = []
    text = ChatRenderer.render

    def counted(self: ChatRenderer, messages: list, tools: Any, *, add_generation_prompt: bool = False) -> str:
        rendered.append(len(messages))
        return text(self, messages, tools, add_generation_prompt=add_generation_prompt)

    monkeypatch.setattr(ChatRenderer, "render", counted)
    messages = [{"role": role, "content": f"{role} {turn}"} for turn in range(3) for role in ("user", "assistant")]
    encoder(name, "assistant").encode([MessagesRow("1", messages)])
    assert sorted(rendered) == [1, 3, 5, 6]
    rendered.clear()
    encoder(name, "last").encode([MessagesRow("1", messages)])
    assert sorted(rendered) == [5, 6]


def test_content_that_is_not_a_string():
    messages = [{"role": "user", "content": [{"text": "the cat"}], "train": True}]
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content[0].text }}<|im_end|>{% endfor %}"
    (row,) = RowEncoder(tokenizer, "assistant").encode([MessagesRow("train.jsonl, line 7", messages)])
    assert isinstance(row, BadRow) and row.reason == "the content of message 1 is no string; write a string"


def test_a_content_that_the_template_also_writes():
    # As in GLM-4.5: without `reasoning_content`, the text before </think> counts as the thought, and is omitted.
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}\n<think>"
        "{{ m.reasoning_content if loop.last and m.reasoning_content is string else '' }}</think>"
        "{% set said = m.content if m.reasoning_content is string else m.content.split('</think>')[-1] %}"
        "{{ '\n' + said if said else '' }}{% else %}\n{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    thoughtful = {"role": "assistant", "content": "</think>", "reasoning_content": "who?"}
    thoughtless = {"role": "assistant", "content": "</think>"}
    user = {"role": "user", "content": "the cat"}
    written, left_out = "<think></think></think>", "<think></think>"
    for answers, expected in (
        ((thoughtful, thoughtless, thoughtless), (written, left_out, left_out)),
        ((thoughtless, thoughtful, thoughtless), (left_out, written, left_out)),
    ):
        row = MessagesRow("1", [message for answer in answers for message in (user, answer)])
        (encoded,) = make_template_encoder(template).encode([row])
        assert isinstance(encoded, EncodedSequence)
        trained_text = published("chatml").decode(encoded.tokens[encoded.loss_mask]).replace("\n", "")
        assert trained_text == "".join(expected)
