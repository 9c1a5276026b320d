"""If this fails, training sees another text than `apply_chat_template` returns at inference."""

from __future__ import annotations

import functools
import signal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError, TemplateSyntaxError

from qlora_dist.data import template_limit
from qlora_dist.data.chat_renderer import ChatRenderer
from qlora_dist.data.row_encoder import RowEncoder
from qlora_dist.data.source_row import MessagesRow
from qlora_dist.data.template_probe import UnsupportedConversationError
from qlora_dist.data.tokenizer import SHIPPED_TEMPLATES, read_chat_template
from tests.helpers import tiny_models
from tests.helpers.published_tokenizers import FAMILIES, make_tokenizer

published = functools.cache(make_tokenizer)

TEXTS = st.sampled_from(["", "the cat", " sat\n", "\n\nfoo", "<think>\na\n</think>\n\nsat", "字🙂", "<|im_end|>"])
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "what", "arguments": {"role": "cat"}}}
TOOLS = [{"type": "function", "function": {"name": "what", "description": "<a> thought"}}]


@st.composite
def conversations(draw: Any) -> list[dict[str, Any]]:
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXTS), "name": draw(st.sampled_from([None, "x"]))})
        if draw(st.integers(0, 4)) == 0:
            content = draw(st.sampled_from([None, "", "the log"]))
            messages.append({"role": "assistant", "content": content, "tool_calls": [CALL]})
            messages.append({"role": "tool", "content": draw(TEXTS), "tool_call_id": "abcdefghi"})
        answer = {"role": "assistant", "content": draw(TEXTS)}
        if draw(st.integers(0, 3)) == 0:
            answer[draw(st.sampled_from(["reasoning_content", "thinking", "reasoning"]))] = draw(TEXTS)
        messages.append(answer)
    return messages


def transformers_text(tokenizer, messages, tools, prompting) -> str | None:
    try:
        return tokenizer.apply_chat_template(messages, tools, tokenize=False, add_generation_prompt=prompting)
    except TemplateError:
        return None


def renderer_text(renderer: ChatRenderer, messages, tools, prompting) -> str | None:
    try:
        return renderer.render(renderer.prepare_messages(messages), tools, add_generation_prompt=prompting)
    except UnsupportedConversationError as refused:
        assert "the chat template" in str(refused)
        return None


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(messages=conversations(), tools=st.sampled_from([None, TOOLS]), prompting=st.booleans())
def test_equals_apply_chat_template(name, messages, tools, prompting):
    tokenizer = published(name)
    text = renderer_text(_renderer(name), messages, tools, prompting)
    if text is None and (
        "tool_calls" not in tokenizer.chat_template
        or _has_reasoning(messages) > ("reasoning" in tokenizer.chat_template)
    ):
        return  # apply_chat_template would silently omit the calls or the thoughts.
    assert text == transformers_text(tokenizer, messages, tools, prompting)


def _has_reasoning(messages: list[dict[str, Any]]) -> bool:
    names = ("reasoning_content", "thinking", "reasoning")
    return any(message.get(name, "").strip() for message in messages for name in names)


@functools.cache
def _renderer(name: str) -> ChatRenderer:
    return ChatRenderer(published(name).chat_template, published(name).special_tokens_map)


@functools.cache
def _tokenizer_with_shipped_template(name: str):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = read_chat_template(name, tokenizer)
    return tokenizer


@pytest.mark.parametrize("name", SHIPPED_TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(messages=conversations())
def test_marks_equal_apply_chat_template(name, messages):
    """The text and the tokens in the marked spans are equal to the result of transformers."""
    tokenizer = _tokenizer_with_shipped_template(name)
    renderer = ChatRenderer(tokenizer.chat_template, tokenizer.special_tokens_map)
    assert renderer.has_generation_blocks
    try:
        text, spans = renderer.render_with_assistant_spans(renderer.prepare_messages(messages), None)
    except UnsupportedConversationError:
        assert _has_reasoning(messages) or transformers_text(tokenizer, messages, None, False) is None
        return
    assert text == transformers_text(tokenizer, messages, None, False)
    encoding = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    flags = [False] * len(encoding["input_ids"])
    for start, end in spans:
        for token in range(encoding.char_to_token(start), encoding.char_to_token(end - 1) + 1):
            flags[token] = True
    assert flags == [bool(flag) for flag in encoding["assistant_masks"]]


def test_train_is_not_passed_to_the_template():
    renderer = ChatRenderer("{{ messages | tojson }}", {})
    messages = [{"role": "user", "content": "a", "train": True, "name": None, "x": [None]}]
    assert renderer_text(renderer, messages, None, False) == '[{"role": "user", "content": "a", "x": [null]}]'
    assert messages[0]["train"] is True, "the row is unchanged"


def test_arguments_become_an_object():
    renderer = ChatRenderer("{{ messages[0].tool_calls | tojson }}", {})

    def rendered(call: Any) -> str:
        return renderer.render(renderer.prepare_messages([{"role": "assistant", "tool_calls": [call]}]), None)

    assert rendered({"function": {"name": "f", "arguments": '{"a":1}'}}) == (
        '[{"function": {"name": "f", "arguments": {"a": 1}}}]'
    )
    assert rendered({"name": "f", "arguments": ""}) == '[{"name": "f", "arguments": {}}]'
    assert rendered({"function": {"name": "f", "arguments": {"a": "1"}}}) == (
        '[{"function": {"name": "f", "arguments": {"a": "1"}}}]'
    )
    assert rendered({"name": "f"}) == '[{"name": "f"}]'
    for arguments in ('{"a":', "[1]", "1"):
        with pytest.raises(UnsupportedConversationError, match="not a JSON object; write an object"):
            rendered({"function": {"name": "f", "arguments": arguments}})
    with pytest.raises(UnsupportedConversationError, match="`tool_calls` is not a list of objects"):
        rendered("f")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0].x.y }}", "'dict object' has no attribute 'x'"),
        ("{{ 'a' + messages | length }}", "can only concatenate str"),
        ("{{ raise_exception('two\nlines') }}", "(two lines)"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe)"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_any_error_of_a_template_is_a_reason(template, reason):
    """A template is foreign code. It runs in transformers' sandbox, and its errors are errors of the row."""
    with pytest.raises(UnsupportedConversationError) as refused:
        ChatRenderer(template, {}).render([{"role": "user", "content": "a"}], None)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_marks_after_a_refusal():
    """The tracker of marks is released when a template fails, because otherwise no later row could be rendered."""
    template = "{% generation %}{{ 'a' + messages[0].content }}{% endgeneration %}"
    renderer = ChatRenderer(template, {})
    with pytest.raises(UnsupportedConversationError):
        renderer.render_with_assistant_spans([{"role": "user", "content": 1}], None)
    assert renderer.render_with_assistant_spans([{"role": "user", "content": "b"}], None) == ("ab", [(0, 2)])


def test_template_for_tools_where_the_tokenizer_has_two():
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = {"default": "{{ messages | length }}", "tool_use": "{{ tools | length }} tools"}
    encoder = RowEncoder(tokenizer, "all")
    messages = [{"role": "user", "content": "a"}]
    rows = encoder.encode([MessagesRow("1", messages), MessagesRow("2", messages, TOOLS)])
    assert [tokenizer.decode(row.tokens) for row in rows] == ["1", "1 tools"]


LOOP = "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}"
HUNGRY = "{% set ns = namespace(text='x' * 1000) %}{% for n in range(100000) %}{% set ns.text = ns.text ~ ns.text %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (f"{LOOP}{{% endfor %}}", "it takes more than 0.5 s of processor time"),
        (f"{HUNGRY}{{% endfor %}}", "it takes more than 0.125 GiB of memory"),
    ],
)
@pytest.mark.parametrize("write", ["render", "render_with_assistant_spans"])
def test_a_template_that_never_ends_is_stopped(monkeypatch, template, reason, write):
    """Otherwise, a template of a foreign model could hang the run or exhaust its memory."""
    monkeypatch.setattr(template_limit, "MAX_CPU_S", 0.5 if "processor" in reason else 30.0)
    monkeypatch.setattr(template_limit, "MAX_MEMORY_GROWTH_BYTES", 2**27)
    renderer = ChatRenderer(template, {})
    with pytest.raises(UnsupportedConversationError, match=rf"\({reason}\); change or take out the row"):
        getattr(renderer, write)([{"role": "user", "content": "hello"}], None)
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_a_template_that_is_nested_too_deeply_does_not_compile():
    with pytest.raises(TemplateSyntaxError, match="nested too deeply"):
        ChatRenderer("{% if a %}" * 3000 + "{% endif %}" * 3000, {})


PARTS_TEMPLATES = {
    "characters of a string have no type": (
        "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% else %}<image>{% endif %}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
    "a filter selects no character": (
        "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ part['text'] }}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    ),
}


@pytest.mark.parametrize("template", PARTS_TEMPLATES.values(), ids=PARTS_TEMPLATES)
def test_a_template_that_writes_parts_only_gets_texts_as_parts(template: str) -> None:
    tokenizer = tiny_models.make_tokenizer(template)
    messages = [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "this is text"}]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert ChatRenderer(template, {}).render(messages, None) == tokenizer.apply_chat_template(parts, tokenize=False)
    (encoded,) = RowEncoder(tokenizer, "assistant").encode([MessagesRow("here", messages, None)])
    assert tokenizer.decode(encoded.tokens) == "user:hello world<|im_end|>assistant:this is text<|im_end|>"
    assert tokenizer.decode(encoded.tokens[encoded.loss_mask]) == "this is text<|im_end|>"


def test_a_template_that_takes_both_gets_strings() -> None:
    template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}"
        "{% if part['type'] == 'text' %}<part>{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    assert ChatRenderer(template, {}).render([{"role": "user", "content": "hello"}], None) == "hello"
