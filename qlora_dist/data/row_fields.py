"""Fields of a row besides those of its format: they are honoured, refused or counted as ignored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from qlora_dist.data.messages import decoded
from qlora_dist.data.source_row import Message, MessagesRow, Row
from qlora_dist.data.validate import Unusable, check_tree, kind, quoted

HONOURED = ("loss_mask", "chat_template_kwargs")
"""Fields that rows of every format have which becomes a conversation of its own fields."""

_MASKS = (
    "train",
    "training",
    "loss",
    "loss_weight",
    "loss_scale",
    "train_detail",
    "assistant_masks",
    "completion_mask",
    "mask",
    "masked",
)
"""Fields by which others say how a whole row is trained."""

_PREFERENCES = ("label", "kto_tag")
"""Fields that say whether an answer is a good one: the preference data of KTO."""

_KNOWN = frozenset({*HONOURED, *_MASKS, *_PREFERENCES, "functions", "weight"})

_MOST_NAMES = 1000
"""Names that are collected. Rows may have names of their own, such as a key for each user."""

_RESERVED = ("messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""Variables of a template that come from the row itself."""


@dataclasses.dataclass(slots=True)
class FieldNames:
    """Names of the fields that a source's rows have and that their format does not read."""

    rows: set[str] = dataclasses.field(default_factory=set)
    messages: set[str] = dataclasses.field(default_factory=set)
    """Fields of messages: the chat template may read them."""
    variables: set[str] = dataclasses.field(default_factory=set)
    """Keys of `chat_template_kwargs`: the chat template may read them."""

    def add_row(self, fields: dict[str, Any], read: frozenset[str]) -> None:
        """Add a row's fields which are not among those that are read."""
        unread = fields.keys() - read
        if unread <= self.rows or len(self.rows) >= _MOST_NAMES:
            return
        self.rows |= {name for name in unread if fields[name] is not None}

    def add_conversation(self, row: MessagesRow) -> None:
        """Add what the messages of a row hold besides a role, a content and tool calls."""
        for message in row.messages:
            if len(message) > 2 and len(self.messages) < _MOST_NAMES:
                self.messages |= message.keys() - _OF_MESSAGES
        if row.variables and len(self.variables) < _MOST_NAMES:
            self.variables |= row.variables.keys()

    def ignored(self, template: Any) -> list[str]:
        """Return what neither the format nor the chat template reads, for people.

        Args:
            template: the text of the chat template; a mapping of names to texts; None.
        """
        texts = template.values() if isinstance(template, dict) else [template or ""]
        words = {word for text in texts for word in re.findall(r"\w+", text)}
        return [
            *(quoted(name) for name in sorted(self.rows)),
            *(f"{quoted(name)} of messages" for name in sorted(self.messages - words)),
            *(f"{quoted(name)} of chat_template_kwargs" for name in sorted(self.variables - words)),
        ]


_OF_MESSAGES = {"role", "content", "tool_calls", "function_call", "train", "reasoning_content", "reasoning", "thinking"}
"""Fields that are read, or refused where the chat template does not write them."""


def check_row_fields(fields: dict[str, Any], honoured: Iterable[str]) -> None:
    """Refuse a field that says how a conversation is to be trained and that is not read.

    Args:
        fields: of a row that holds a conversation, or a prompt and its completion.
        honoured: names of those that the format reads.

    Raises:
        Unusable: it has such a field.
    """
    if _KNOWN.isdisjoint(fields):
        return
    for name in _PREFERENCES:
        value = fields.get(name)
        if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false")):
            raise Unusable(
                f"`{name}` is {str(value).lower()}, so the row is preference data (KTO), which is not trained; keep "
                f"the rows of good answers and take `{name}` out of them"
            )
    for name in (*_MASKS, *(["weight"] if fields.get("weight") == 0 else [])):
        if fields.get(name) not in (None, True):
            raise Unusable(
                f"the row has a `{name}`, which is read in messages only; write `train`: true or false there, or take "
                "it out"
            )
    if fields.get("functions"):
        raise Unusable(
            'the row has `functions`, which are not read; write them as `tools`, each {"type": "function", "function": '
            "...}"
        )
    for name in HONOURED:
        if fields.get(name) and name not in honoured:
            raise Unusable(
                f"the row has a `{name}`, which rows of `messages` may have; take it out, or write `messages`"
            )


def with_row_fields(row: Row, fields: dict[str, Any]) -> Row:
    """Return the row with what `loss_mask` and `chat_template_kwargs` say.

    Raises:
        Unusable: they cannot be followed.
    """
    mask, variables = (decoded(fields.get(name), f"`{name}`") for name in HONOURED)
    if not mask and not variables:
        return row
    if not isinstance(row, MessagesRow):
        name = "loss_mask" if mask else "chat_template_kwargs"
        raise Unusable(f"the row has a `{name}`, and it is no conversation; take it out, or write `messages`")
    return dataclasses.replace(
        row,
        messages=_masked(row.messages, mask) if mask else row.messages,
        variables=_variables(variables) if variables else None,
    )


def _masked(messages: list[Message], mask: Any) -> list[Message]:
    """Leave out of training what has a 0 in LLaMA-Factory's `loss_mask`, which may pass over the system message."""
    if not isinstance(mask, list) or not all(isinstance(flag, bool | int | float) and flag in (0, 1) for flag in mask):
        raise Unusable("`loss_mask` is no list of 0 and 1; write one of them for each message")
    if len(mask) == len(messages) - 1 and messages[0]["role"] == "system":
        mask = [1, *mask]
    if len(mask) != len(messages):
        raise Unusable(f"`loss_mask` has {len(mask)} items for {len(messages)} messages; write one for each message")
    return [message if flag else {**message, "train": False} for message, flag in zip(messages, mask, strict=True)]


def _variables(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise Unusable(f"`chat_template_kwargs` is {kind(given)}; write an object")
    check_tree(given, "`chat_template_kwargs`")
    taken = next((name for name in _RESERVED if name in given), None)
    if taken is not None:
        raise Unusable(f"`chat_template_kwargs` holds `{taken}`, which comes from the row itself; take it out")
    return given
