"""Places of the answers of a long conversation, from a few of them and one more rendering."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from qlora_dist.data.chat_renderer import CharSpan, ChatRenderer
from qlora_dist.data.source_row import Message

MIN_ANSWERS_TO_DERIVE = 24
"""A conversation of fewer answers is rendered up to each of them."""


def derive_answer_spans(
    renderer: ChatRenderer,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    text: str,
    answer_indices: Sequence[int],
    find_exact_span: Callable[[int], CharSpan],
) -> dict[int, CharSpan]:
    """Find where most answers lie without rendering the conversation up to each of them.

    Answers that a template could not tell apart, but for their contents and number, form a group. Of each
    group five are found by `find_exact_span`: the first two, one in the middle and the last two. What these have between
    themselves and their neighbours' contents is looked for around the others, at places that marks tell; an answer
    around which there is something else is found by `find_exact_span` too.

    Args:
        renderer: the template.
        messages: from `Renderer.clean`.
        tools: from `Renderer.tools`.
        text: the whole conversation.
        answer_indices: answers, ascending.
        find_exact_span: where an answer begins and ends, by rendering the conversation up to it.

    Returns:
        The answers that were found. Those beside which no content could be marked are missing.

    Raises:
        Refused: by `find_exact_span`.
    """
    if len(answer_indices) < MIN_ANSWERS_TO_DERIVE:
        return {}
    contents, kinds = _content_spans(renderer, messages, tools, text), _context_keys(messages)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index in answer_indices:
        if index - 1 in contents and index + 1 in contents:
            groups[kinds[index]].append(index)
    spans: dict[int, CharSpan] = {}
    for group in groups.values():
        samples = {group[place] for place in (0, 1, len(group) // 2, -2, -1) if -len(group) <= place < len(group)}
        prefixes: set[str] = set()
        suffixes: set[str] = set()
        for index in sorted(group, key=lambda index: (index not in samples, -index)):
            first, last = contents[index - 1][1], contents[index + 1][0]
            starts = [first + len(before) for before in prefixes if text.startswith(before, first)]
            ends = [last - len(behind) for behind in suffixes if text.startswith(behind, last - len(behind))]
            if index not in samples and len(starts) == len(ends) == 1 and starts[0] <= ends[0]:
                spans[index] = starts[0], ends[0]
                continue
            start, end = spans[index] = find_exact_span(index)
            prefixes.add(text[first:start])
            suffixes.add(text[end:last])
    return spans


def _content_spans(
    renderer: ChatRenderer, messages: list[Message], tools: list[dict[str, Any]] | None, text: str
) -> dict[int, CharSpan]:
    """Return where the contents of others than the assistant lie; empty if marks around them change the text."""
    number = 0
    while (marker := f"qzj{number}z") in text:
        number += 1
    marked = list(messages)
    stripped_space: dict[int, tuple[str, str]] = {}
    for index, message in enumerate(messages):
        content = message.get("content")
        if message["role"] != "assistant" and isinstance(content, str) and (core := content.strip()):
            # white space stays outside of the marks, since a template may trim it
            lead, trail = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
            stripped_space[index] = lead, trail
            marked[index] = {**message, "content": f"{lead}{marker}{index}b{core}{marker}{index}e{trail}"}
    written = renderer.text(marked, tools)
    marker_positions: dict[tuple[int, str], int] = {}
    pieces, last, length = [], 0, 0
    for match in re.finditer(rf"{marker}(\d+)([be])", written):
        pieces.append(written[last : match.start()])
        length += match.start() - last
        last = match.end()
        if marker_positions.setdefault((int(match[1]), match[2]), length) != length:
            return {}
    if "".join([*pieces, written[last:]]) != text:
        return {}
    spans = {}
    for index, (lead, trail) in stripped_space.items():
        start, end = marker_positions.get((index, "b")), marker_positions.get((index, "e"))
        if start is not None and end is not None:
            start -= len(lead) if text.endswith(lead, 0, start) else 0
            spans[index] = start, end + (len(trail) if text.startswith(trail, end) else 0)
    return spans


def _context_keys(messages: list[Message]) -> list[tuple[object, ...]]:
    """Return for each message what a template may tell it apart by, contents left aside.

    A template that rewrites history does so from one question on, or up to it (thoughts), or by what else has been
    said since: so the question that is answered counts, and the kinds of answers before and after it up to the next.
    """
    own = [_message_key(message) for message in messages]
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    last = questions[-1] if questions else -1
    before = _keys_since_question(messages, own)
    after = _keys_since_question(messages[::-1], own[::-1])[::-1]
    neighbours = zip([None, *own[:-1]], [*own[1:], None], strict=True)
    return [
        (kind, *sides, seen, to_come, index > last)
        for index, (kind, sides, seen, to_come) in enumerate(zip(own, neighbours, before, after, strict=True))
    ]


def _message_key(message: Message) -> tuple[object, ...]:
    content = message.get("content")
    text = content if isinstance(content, str) else ""
    return message["role"], *sorted(message), bool(text.strip()), "</think>" in text


def _keys_since_question(messages: list[Message], own: list[tuple[object, ...]]) -> list[frozenset[object]]:
    """Return for each message the kinds of those before it, back to a user's message."""
    seen: frozenset[object] = frozenset()
    keys = []
    for message, kind in zip(messages, own, strict=True):
        keys.append(seen)
        if message["role"] == "user":
            seen = frozenset()
        elif kind not in seen:
            seen |= {kind}
    return keys
