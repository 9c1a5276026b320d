"""One sequence per answer: the prompt that inference would see, and the answer as the chat template writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from qlora_dist.data.answer_spans import unused_marker
from qlora_dist.data.chat_renderer import CharSpan, ChatRenderer
from qlora_dist.data.source_row import Message
from qlora_dist.data.template_probe import UnsupportedConversationError
from qlora_dist.data.turn_spans import common_prefix_length, find_turn_end, require_prompt

_REASONING_TAGS = (
    ("<think>", "</think>"),
    ("<|channel>", "<channel|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
)
"""Tags that open and close a thought in the templates of reasoning models."""


class RenderedAnswer(NamedTuple):
    """One answer with its prompt."""

    prompt: str
    """Text that `apply_chat_template` gives inference before the answer."""
    completion: str
    """Text after the prompt."""
    spans: list[CharSpan]
    """Spans of the trained characters of `completion`, in ascending order."""


def render_answers(
    renderer: ChatRenderer,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    trained_indices: Sequence[int],
    added_tokens: tuple[str, ...],
) -> list[RenderedAnswer]:
    """Render each answer after the prompt that inference would see. Later messages have no effect.

    `render_with_turn_spans` describes the arguments.
    """
    others = [index for index in trained_indices if messages[index]["role"] != "assistant"]
    if others:
        raise UnsupportedConversationError(
            f"message {others[0] + 1} is trained and is not the assistant's, which one row per answer cannot hold; "
            "take its `train` out, or give data.chat_template a template that does not rewrite history"
        )
    return [_render_answer(renderer, messages[: index + 1], tools, added_tokens) for index in trained_indices]


def _render_answer(
    renderer: ChatRenderer, messages: list[Message], tools: list[dict[str, Any]] | None, added_tokens: tuple[str, ...]
) -> RenderedAnswer:
    index = len(messages) - 1
    require_prompt(index)
    prompt = renderer.render(messages[:index], tools, add_generation_prompt=True)
    text, marks = (
        renderer.render_with_assistant_spans(messages, tools)
        if renderer.has_generation_blocks
        else (renderer.render(messages, tools), [])
    )
    if text.startswith(prompt):
        start = len(prompt)
        spans = [(max(first, start) - start, last - start) for first, last in marks if last > start]
        answer = text[start:]
        if renderer.has_generation_blocks and not spans:
            raise UnsupportedConversationError(
                f"the chat template marks nothing of message {index + 1} with {{% generation %}}; use another template"
            )
        return RenderedAnswer(prompt, answer, spans or [(0, find_turn_end(answer, len(answer), added_tokens))])
    answer = _continue_from_prompt(renderer, messages, tools, prompt, text, added_tokens)
    return RenderedAnswer(prompt, answer, [(0, find_turn_end(answer, len(answer), added_tokens))])


def _continue_from_prompt(
    renderer: ChatRenderer,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    prompt: str,
    text: str,
    added_tokens: tuple[str, ...],
) -> str:
    """Return the continuation of a prompt with which the text up to the answer does not begin.

    There are two causes. The template writes earlier messages differently once there is an answer (Mistral's system
    message). Or the prompt ends with more than the text before the answer (an opened thought). Only the text after the
    last message before the answer is therefore compared.
    """
    index = len(messages) - 1
    prompt_tail, text_tail = _text_after_question(renderer, messages, tools, prompt, text)
    start = _common_prefix_of_whole_tokens(prompt_tail, text_tail, added_tokens)
    prompt_rest, answer_rest = prompt_tail[start:], text_tail[start:]
    thought = prompt_rest.strip()
    if not thought or any(
        thought.startswith(opening) and thought.endswith(closing) for opening, closing in _REASONING_TAGS
    ):
        return answer_rest  # The prompt has additional white space or an empty thought, which the answer continues.
    for opening, closing in _REASONING_TAGS:
        if thought == opening:
            return _continue_open_reasoning(messages[index], index, prompt_rest, answer_rest, opening, closing)
    raise UnsupportedConversationError(
        f"the chat template's prompt for message {index + 1} ends with {prompt_rest[-60:]!r}, and the answer does not "
        "continue that; remove from the answer a thought that this template does not ask for, or give "
        "data.chat_template another template"
    )


def _text_after_question(
    renderer: ChatRenderer, messages: list[Message], tools: list[dict[str, Any]] | None, prompt: str, text: str
) -> tuple[str, str]:
    """Return the text after the last message before the answer, once in the prompt and once in the conversation."""
    question = messages[-2]
    content = question.get("content", "")
    mark = unused_marker(prompt + text)
    if isinstance(content, str):
        marked = [*messages[:-2], {**question, "content": content + mark}]
        is_in_prompt, prompt_tail = _text_after_marker(renderer.render(marked, tools, add_generation_prompt=True), mark)
        is_in_text, text_tail = _text_after_marker(renderer.render([*marked, messages[-1]], tools), mark)
        if is_in_prompt and is_in_text and prompt.endswith(prompt_tail) and text.endswith(text_tail):
            return prompt_tail, text_tail
    raise UnsupportedConversationError(
        f"the chat template writes message {len(messages) - 1} differently once it is answered, so the answer cannot "
        "be separated from the prompt; give data.chat_template another template"
    )


def _text_after_marker(text: str, mark: str) -> tuple[bool, str]:
    return text.count(mark) == 1, text.partition(mark)[2]


def _common_prefix_of_whole_tokens(one: str, other: str, added_tokens: tuple[str, ...]) -> int:
    """Return the length of the common prefix of two texts, without a part of a special token."""
    length = common_prefix_length(one, other)
    tokens = {*added_tokens, *(tag for pair in _REASONING_TAGS for tag in pair)}
    starts = [
        start
        for token in tokens
        for start in range(max(0, length - len(token) + 1), length)
        if one.startswith(token, start) or other.startswith(token, start)
    ]
    return min(starts, default=length)


def _continue_open_reasoning(answer: Message, index: int, opened: str, rest: str, opening: str, closing: str) -> str:
    """Return the answer to a prompt that opens a thought.

    If the template omits the thought of a conversation, it is taken from the content, because inference generates it.
    """
    content = answer.get("content")
    thought, closed, _ = rest.partition(closing)
    if closed and opening not in thought:
        return rest
    if isinstance(content, str) and closing in content:
        reasoning_content = content.lstrip().removeprefix(opening)
        reasoning_content = reasoning_content.removeprefix(opened[opened.index(opening) + len(opening) :])
        words = content.rpartition(closing)[2]
        for kept in (words, words.strip()):
            if rest.startswith(kept):
                return (reasoning_content if kept == words else reasoning_content.rstrip()) + rest[len(kept) :]
    raise UnsupportedConversationError(
        f"the chat template's prompt for message {index + 1} opens a thought ({opened!r}) and the answer holds none; "
        f"begin its `content` with {opening}...{closing}, which may be empty, or give data.chat_template a template "
        "that opens none"
    )
