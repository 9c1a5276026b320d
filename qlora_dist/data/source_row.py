"""Rows of a source: parsed rows with their location, and rows that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_dist.errors import UserError

Message = dict[str, Any]
"""Message with the strings `role` and `content` (optional beside `tool_calls`), and an optional boolean `train`. All
other fields are for the chat template."""


@dataclass(frozen=True, slots=True)
class TextRow:
    """Document of which every token is trained."""

    location: str
    """'FILE, line N' (JSONL, CSV) or 'FILE, row N', counted from 1."""
    text: str


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """Prompt and completion, which are concatenated unchanged. The completion is trained."""

    location: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class MessagesRow:
    """Conversation of at least one message."""

    location: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that may be called, if the template writes them."""
    template_variables: dict[str, Any] | None = None
    """Additional variables of the chat template, from `chat_template_kwargs`."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """Row that cannot be used. Readers yield it like other rows, and their caller decides whether to stop."""

    location: str
    reason: str
    """Problem and remedy: 'the row has no `messages` (...); add it or take the row out'."""

    def to_error(self) -> UserError:
        return UserError(f"{self.location}: {self.reason}")


SourceRow = TextRow | CompletionRow | MessagesRow
