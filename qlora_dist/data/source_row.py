"""What a source gives: typed rows that know where they stand, and rows that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_dist.errors import UserError

Message = dict[str, Any]
"""`role` and `content` are strings (`content` may be missing beside `tool_calls`); `train`, where there is one, a
boolean. Whatever else a message holds is the chat template's business."""


@dataclass(frozen=True, slots=True)
class TextRow:
    """A document: every token is trained."""

    place: str
    """'FILE, line N' (JSONL, CSV) or 'FILE, row N', counted from 1."""
    text: str


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """A prompt and what follows it, written one behind the other as they are; the completion is trained."""

    place: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class MessagesRow:
    """A conversation, of at least one message."""

    place: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that may be called, for templates that write them."""
    variables: dict[str, Any] | None = None
    """Variables of the chat template besides those that each conversation has: `chat_template_kwargs`."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used. It is handed on like a row: the reader's consumer decides whether to stop."""

    place: str
    reason: str
    """What is wrong, and the remedy: 'the row has no `messages` (...); add it or take the row out'."""

    def error(self) -> UserError:
        """The same as an exception."""
        return UserError(f"{self.place}: {self.reason}")


SourceRow = TextRow | CompletionRow | MessagesRow
