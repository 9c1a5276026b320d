"""Fields of a row besides those of its format: they are honoured, refused or counted as ignored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from qlora_dist.data.messages import decode_json_field
from qlora_dist.data.source_row import Message, MessagesRow, SourceRow
from qlora_dist.data.validate import InvalidRowError, check_json_value, json_type_name, quote

CONVERSATION_ROW_FIELDS = ("loss_mask", "chat_template_kwargs")
"""Fields that rows of every format have which becomes a conversation of its own fields."""

_UNSUPPORTED_MASK_FIELDS = (
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

_PREFERENCE_FIELDS = ("label", "kto_tag")
"""Fields that say whether an answer is a good one: the preference data of KTO."""

_INSPECTED_FIELDS = frozenset(
    {*CONVERSATION_ROW_FIELDS, *_UNSUPPORTED_MASK_FIELDS, *_PREFERENCE_FIELDS, "functions", "weight"}
)

_MAX_COLLECTED_NAMES = 1000
"""Names that are collected. Rows may have names of their own, such as a key for each user."""

_RESERVED_VARIABLES = (
    "messages",
    "conversation",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
)
"""Variables of a template that come from the row itself."""


@dataclasses.dataclass(slots=True)
class UnreadFields:
    """Names of the fields that a source's rows have and that their format does not read."""

    rows: set[str] = dataclasses.field(default_factory=set)
    messages: set[str] = dataclasses.field(default_factory=set)
    """Fields of messages: the chat template may read them."""
    variables: set[str] = dataclasses.field(default_factory=set)
    """Keys of `chat_template_kwargs`: the chat template may read them."""

    def add_row(self, fields: dict[str, Any], read_fields: frozenset[str]) -> None:
        """Add a row's fields which are not among those that are read."""
        unread = fields.keys() - read_fields
        if unread <= self.rows or len(self.rows) >= _MAX_COLLECTED_NAMES:
            return
        self.rows |= {name for name in unread if fields[name] is not None}

    def add_conversation(self, row: MessagesRow) -> None:
        """Add what the messages of a row hold besides a role, a content and tool calls."""
        for message in row.messages:
            if len(message) > 2 and len(self.messages) < _MAX_COLLECTED_NAMES:
                self.messages |= message.keys() - _READ_MESSAGE_FIELDS
        if row.variables and len(self.variables) < _MAX_COLLECTED_NAMES:
            self.variables |= row.variables.keys()

    def ignored(self, template: Any) -> list[str]:
        """Return what neither the format nor the chat template reads, for people.

        Args:
            template: the text of the chat template; a mapping of names to texts; None.
        """
        texts = template.values() if isinstance(template, dict) else [template or ""]
        words = {word for text in texts for word in re.findall(r"\w+", text)}
        return [
            *(quote(name) for name in sorted(self.rows)),
            *(f"{quote(name)} of messages" for name in sorted(self.messages - words)),
            *(f"{quote(name)} of chat_template_kwargs" for name in sorted(self.variables - words)),
        ]


_READ_MESSAGE_FIELDS = {
    "role",
    "content",
    "tool_calls",
    "function_call",
    "train",
    "reasoning_content",
    "reasoning",
    "thinking",
}
"""Fields that are read, or refused where the chat template does not write them."""


def check_row_fields(fields: dict[str, Any], format_fields: Iterable[str]) -> None:
    """Refuse a field that says how a conversation is to be trained and that is not read.

    Args:
        fields: of a row that holds a conversation, or a prompt and its completion.
        format_fields: names of those that the format reads.

    Raises:
        Unusable: it has such a field.
    """
    if _INSPECTED_FIELDS.isdisjoint(fields):
        return
    for name in _PREFERENCE_FIELDS:
        value = fields.get(name)
        if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false")):
            raise InvalidRowError(
                f"`{name}` is {str(value).lower()}, so the row is preference data (KTO), which is not trained; keep "
                f"the rows of good answers and take `{name}` out of them"
            )
    for name in (*_UNSUPPORTED_MASK_FIELDS, *(["weight"] if fields.get("weight") == 0 else [])):
        if fields.get(name) not in (None, True):
            raise InvalidRowError(
                f"the row has a `{name}`, which is read in messages only; write `train`: true or false there, or take "
                "it out"
            )
    if fields.get("functions"):
        raise InvalidRowError(
            'the row has `functions`, which are not read; write them as `tools`, each {"type": "function", "function": '
            "...}"
        )
    for name in CONVERSATION_ROW_FIELDS:
        if fields.get(name) and name not in format_fields:
            raise InvalidRowError(
                f"the row has a `{name}`, which rows of `messages` may have; take it out, or write `messages`"
            )


def apply_row_fields(row: SourceRow, fields: dict[str, Any]) -> SourceRow:
    """Return the row with what `loss_mask` and `chat_template_kwargs` say.

    Raises:
        Unusable: they cannot be followed.
    """
    mask, variables = (decode_json_field(fields.get(name), f"`{name}`") for name in CONVERSATION_ROW_FIELDS)
    if not mask and not variables:
        return row
    if not isinstance(row, MessagesRow):
        name = "loss_mask" if mask else "chat_template_kwargs"
        raise InvalidRowError(f"the row has a `{name}`, and it is no conversation; take it out, or write `messages`")
    return dataclasses.replace(
        row,
        messages=_apply_loss_mask(row.messages, mask) if mask else row.messages,
        variables=_variables(variables) if variables else None,
    )


def _apply_loss_mask(messages: list[Message], mask: Any) -> list[Message]:
    """Leave out of training what has a 0 in LLaMA-Factory's `loss_mask`, which may pass over the system message."""
    if not isinstance(mask, list) or not all(isinstance(flag, bool | int | float) and flag in (0, 1) for flag in mask):
        raise InvalidRowError("`loss_mask` is no list of 0 and 1; write one of them for each message")
    if len(mask) == len(messages) - 1 and messages[0]["role"] == "system":
        mask = [1, *mask]
    if len(mask) != len(messages):
        raise InvalidRowError(
            f"`loss_mask` has {len(mask)} items for {len(messages)} messages; write one for each message"
        )
    return [message if flag else {**message, "train": False} for message, flag in zip(messages, mask, strict=True)]


def _variables(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InvalidRowError(f"`chat_template_kwargs` is {json_type_name(given)}; write an object")
    check_json_value(given, "`chat_template_kwargs`")
    taken = next((name for name in _RESERVED_VARIABLES if name in given), None)
    if taken is not None:
        raise InvalidRowError(f"`chat_template_kwargs` holds `{taken}`, which comes from the row itself; take it out")
    return given
