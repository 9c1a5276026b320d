"""Text of a conversation, and the spans of its turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qlora_dist.data.answer_spans import derive_answer_spans
from qlora_dist.data.chat_renderer import CharSpan, ChatRenderer
from qlora_dist.data.source_row import Message
from qlora_dist.data.template_probe import UnsupportedConversationError


def render_with_turn_spans(
    renderer: ChatRenderer,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    indices: Sequence[int],
    end_tokens: tuple[str, ...],
) -> tuple[str, list[CharSpan]]:
    """Return a conversation's text, and the spans of the messages `indices` in ascending order.

    `messages` and `tools` are results of `ChatRenderer`. `end_tokens` are the texts of the tokens that may end a turn.
    """
    if not renderer.has_generation_blocks:
        text = renderer.render(messages, tools)
        return text, _TurnFinder(renderer, messages, tools, text, end_tokens).spans(indices)
    text, marks = renderer.render_with_assistant_spans(messages, tools)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    trained_answers = [index for index in answers if index in indices]
    if trained_answers != answers:
        if trained_answers and len(marks) != len(answers):
            raise RewrittenHistoryError(
                f"the chat template marks {len(marks)} passages for {len(answers)} messages of the assistant, so it "
                "is unknown which passage is whose; set data.multi_turn: auto, train all of them, or use another "
                "chat template"
            )
        marks = (
            [mark for index, mark in zip(answers, marks, strict=True) if index in indices] if trained_answers else []
        )
    others = [index for index in indices if index not in answers]
    return text, sorted(marks + _TurnFinder(renderer, messages, tools, text, end_tokens).spans(others))


class RewrittenHistoryError(UnsupportedConversationError):
    """Conversation of which one rendering does not show each answer as at inference."""


def require_prompt(index: int) -> None:
    """Refuse a conversation whose first message is an answer."""
    if index == 0:
        raise UnsupportedConversationError("the conversation starts with the assistant; put a user's message before it")


def find_turn_end(text: str, end: int, added_tokens: tuple[str, ...]) -> int:
    """Return the end of a turn that is written up to `end`, without white space after its end token.

    ChatML writes a line feed after <|im_end|>, but generation has stopped by then.
    """
    stripped = text[:end].rstrip()
    return len(stripped) if stripped.endswith(added_tokens) else end


class _TurnFinder:
    """Finder of the turns of one conversation, which renders parts of it.

    The parts are compared as text, not as tokens. An answer that starts with a line feed would otherwise be refused,
    because that line feed and the prompt's form one token.
    """

    def __init__(
        self,
        renderer: ChatRenderer,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        text: str,
        end_tokens: tuple[str, ...],
    ) -> None:
        self._renderer = renderer
        self._messages = messages
        self._tools = tools
        self._text = text
        self._end_tokens = end_tokens
        self._answer_affixes: tuple[str, str] | None = None
        """Texts that the template writes before and after the content of an answer, or None while unknown."""

    def spans(self, indices: Sequence[int]) -> list[CharSpan]:
        """Return the spans of these messages, with the tokens that end their turns.

        An assistant's span is what the template writes after its prompt. Other spans begin with the content. White
        space after the end token is excluded.
        """
        spans = []
        answers = [index for index in indices if self._messages[index]["role"] == "assistant"]
        derived = derive_answer_spans(
            self._renderer, self._messages, self._tools, self._text, answers, self._answer_span
        )
        for index in reversed(indices):  # The last answer is the most informative.
            if index in derived:
                start, end = derived[index]
            else:
                start, end = self._answer_span(index) if index in answers else self._turn_span(index)
            spans.append((start, max(start, find_turn_end(self._text, end, self._end_tokens))))
        return spans[::-1]

    def _answer_span(self, index: int) -> CharSpan:
        require_prompt(index)
        prompt = self._renderer.render(self._messages[:index], self._tools, add_generation_prompt=True)
        if not self._text.startswith(prompt):
            raise _rewritten_history_error("the prompt", index)
        end = self._end_by_affixes(index, len(prompt))
        if end is not None:
            return len(prompt), end
        answered = self._render_until(index)
        if not answered.startswith(prompt):
            raise _rewritten_history_error("the prompt", index)
        self._learn_affixes(index, prompt, answered)
        if self._text.startswith(answered):
            return len(prompt), len(answered)
        return len(prompt), self._end_if_rewritten(index, prompt, answered)

    def _end_by_affixes(self, index: int, start: int) -> int | None:
        """Return the end of the answer if the known affixes surround its content; None otherwise.

        This saves half of the renderings.
        """
        if self._answer_affixes is None or "tool_calls" in self._messages[index]:
            return None
        before, after = self._answer_affixes
        content = self._content(index)
        for rendered_content in (content, content.strip()):
            for answer in (before + rendered_content + after, rendered_content + after):
                if self._text.startswith(answer, start):
                    return start + len(answer)
        return None

    def _learn_affixes(self, index: int, prompt: str, answered: str) -> None:
        content, answer = self._content(index), answered[len(prompt) :]
        if not content or content != content.strip() or "tool_calls" in self._messages[index]:
            return  # The template may have trimmed the content, or the calls may be in between.
        # The text before the content may contain it too. The suffix is then too long, and matches nothing.
        start = answer.find(content)
        # A template may write the same text itself, and omit the content.
        if start >= 0 and (
            content not in self._renderer.source or self._is_from_content(index, prompt + answer[:start] + content)
        ):
            self._answer_affixes = answer[:start], answer[start + len(content) :]

    def _is_from_content(self, index: int, prefix: str) -> bool:
        """Return whether `prefix` ends with the content itself, and not with equal text of the template."""
        mark = self._unused_character(index)
        marked = self._with_content(index, lambda content: content + mark)
        return self._renderer.render(marked[: index + 1], self._tools).startswith(prefix + mark)

    def _end_if_rewritten(self, index: int, prompt: str, answered: str) -> int:
        """Return the end of an answer that is rewritten once there is a later turn (Qwen 3 omits thoughts).

        A marker is put after the content. The text after the marker does not depend on the answer. If the answer is the
        last message, this text ends the turn, and here the text after the answer must begin with it.
        """
        mark = self._unused_character(index)
        marked = self._with_content(index, lambda content: content + mark)
        closing = _common_suffix(answered, self._renderer.render(marked[: index + 1], self._tools))
        whole = self._renderer.render(marked, self._tools)
        rest = _common_suffix(self._text, whole)
        is_content_rendered = whole.startswith(prompt) and whole[: len(whole) - len(rest)].endswith(mark)
        end = len(self._text) - len(rest) + len(closing)
        if not is_content_rendered or not rest.startswith(closing) or end < len(prompt):
            raise _rewritten_history_error("an earlier turn", index)
        return end

    def _turn_span(self, index: int) -> CharSpan:
        rendered_until = self._render_until(index)
        if not self._text.startswith(rendered_until):
            raise _rewritten_history_error("an earlier turn", index)
        mark = self._unused_character(index)
        marked = self._renderer.render(
            self._with_content(index, lambda content: mark + content)[: index + 1], self._tools
        )
        start = common_prefix_length(rendered_until, marked)
        if not marked.startswith(mark, start):
            raise UnsupportedConversationError(
                f"`train` of message {index + 1} is true, and the chat template writes no turn for that message; "
                "take `train` out, or use another chat template"
            )
        return start, len(rendered_until)

    def _render_until(self, index: int) -> str:
        if index == len(self._messages) - 1:
            return self._text
        return self._renderer.render(self._messages[: index + 1], self._tools)

    def _unused_character(self, index: int) -> str:
        """Return a character that the content does not contain and no template trims."""
        return next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in self._content(index))

    def _with_content(self, index: int, change: Callable[[str], str]) -> list[Message]:
        messages = list(self._messages)
        messages[index] = {**messages[index], "content": change(self._content(index))}
        return messages

    def _content(self, index: int) -> str:
        content = self._messages[index].get("content", "")
        if not isinstance(content, str):
            raise UnsupportedConversationError(f"the content of message {index + 1} is no string; write a string")
        return content


def common_prefix_length(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _common_suffix(one: str, other: str) -> str:
    return one[len(one) - common_prefix_length(one[::-1], other[::-1]) :]


def _rewritten_history_error(part: str, index: int) -> RewrittenHistoryError:
    return RewrittenHistoryError(
        f"the chat template rewrites history ({part} of message {index + 1} changes with what follows), so the "
        "conversation cannot be trained as one row; set data.multi_turn: auto, or give data.chat_template a template "
        "that does not, preferably one with {% generation %} markers"
    )
