"""Spans of the answers of a long conversation, derived from a few of them and one more rendering."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from qlora_dist.data.chat_renderer import CharSpan, ChatRenderer
from qlora_dist.data.source_row import Message

MIN_ANSWERS_TO_DERIVE = 24
"""Fewest answers for which spans are derived. A shorter conversation is rendered up to each of its answers."""


def derive_answer_spans(
    renderer: ChatRenderer,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    text: str,
    answer_indices: Sequence[int],
    find_exact_span: Callable[[int], CharSpan],
) -> dict[int, CharSpan]:
    """Find the spans of most answers without rendering the conversation up to each of them.

    Answers that differ only in content and number form a group, because a template treats them alike.
    `find_exact_span`, which renders the conversation up to an answer, finds five of each group: the first two, one in
    the middle and the last two. They show which texts the template writes between an answer and its neighbours'
    contents. Markers show where those contents lie. If the same texts surround another answer, they give its span.
    Otherwise, `find_exact_span` finds it too.

    Returns:
        Spans by message index. An answer is missing if a neighbour's content cannot be marked.
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
        samples = {group[offset] for offset in (0, 1, len(group) // 2, -2, -1) if -len(group) <= offset < len(group)}
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
    """Return the spans of all contents that are not the assistant's; empty if markers around them change the text."""
    marker = unused_marker(text)
    marked = list(messages)
    stripped_space: dict[int, tuple[str, str]] = {}
    for index, message in enumerate(messages):
        content = message.get("content")
        if message["role"] != "assistant" and isinstance(content, str) and (stripped := content.strip()):
            # White space stays outside of the markers, because a template may trim it.
            lead, trail = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
            stripped_space[index] = lead, trail
            marked[index] = {**message, "content": f"{lead}{marker}{index}b{stripped}{marker}{index}e{trail}"}
    rendered = renderer.render(marked, tools)
    marker_positions: dict[tuple[int, str], int] = {}
    pieces, last, length = [], 0, 0
    for match in re.finditer(rf"{marker}(\d+)([be])", rendered):
        pieces.append(rendered[last : match.start()])
        length += match.start() - last
        last = match.end()
        if marker_positions.setdefault((int(match[1]), match[2]), length) != length:
            return {}
    if "".join([*pieces, rendered[last:]]) != text:
        return {}
    spans = {}
    for index, (lead, trail) in stripped_space.items():
        start, end = marker_positions.get((index, "b")), marker_positions.get((index, "e"))
        if start is not None and end is not None:
            start -= len(lead) if text.endswith(lead, 0, start) else 0
            spans[index] = start, end + (len(trail) if text.startswith(trail, end) else 0)
    return spans


def unused_marker(text: str) -> str:
    """Return a word that is not in the text. Its letters and digits survive a template's trimming and JSON."""
    number = 0
    while (mark := f"qzj{number}jzq") in text:
        number += 1
    return mark


def _context_keys(messages: list[Message]) -> list[tuple[object, ...]]:
    """Return, for each message, everything except its content by which a template may treat it differently.

    A template may rewrite history before or after a certain question (as for thoughts), or depending on later messages.
    The key therefore holds the kinds of messages around an answer, up to the user's messages before and after it.
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
    """Return, for each message, the kinds of the messages before it, back to the last user message."""
    seen: frozenset[object] = frozenset()
    keys = []
    for message, kind in zip(messages, own, strict=True):
        keys.append(seen)
        if message["role"] == "user":
            seen = frozenset()
        elif kind not in seen:
            seen |= {kind}
    return keys
