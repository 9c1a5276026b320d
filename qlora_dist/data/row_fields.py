"""Fields of a row that its format does not define: they are applied, refused or reported as ignored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from qlora_dist.data.messages import MEDIA_REMEDY, decode_json_field
from qlora_dist.data.source_row import Message, MessagesRow, SourceRow
from qlora_dist.data.validate import InvalidRowError, check_json_value, json_type_name, quote

CONVERSATION_ROW_FIELDS = ("loss_mask", "chat_template_kwargs")
"""Fields that are read in rows of every format whose own fields become a conversation."""

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
"""Fields by which other tools choose what is trained of a whole row."""

_PREFERENCE_FIELDS = ("label", "kto_tag")
"""Fields of KTO's preference data, which rate an answer as good or bad."""

_MEDIA_FIELDS = ("images", "image", "videos", "video", "audios", "audio")

_INSPECTED_FIELDS = frozenset(
    {*CONVERSATION_ROW_FIELDS, *_UNSUPPORTED_MASK_FIELDS, *_PREFERENCE_FIELDS, *_MEDIA_FIELDS, "functions", "weight"}
)

_MAX_COLLECTED_NAMES = 1000
"""Most field names that are collected. Rows may have names of their own, such as a key for each user."""

_RESERVED_VARIABLES = (
    "messages",
    "conversation",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
)
"""Template variables that are set from the row itself."""


@dataclasses.dataclass(slots=True)
class UnreadFields:
    """Names of fields that a source's rows have but their format does not read."""

    row_fields: set[str] = dataclasses.field(default_factory=set)
    message_fields: set[str] = dataclasses.field(default_factory=set)
    template_variables: set[str] = dataclasses.field(default_factory=set)
    """Keys of `chat_template_kwargs`. The chat template may read them, and fields of messages."""

    def add_row(self, fields: dict[str, Any], read_fields: frozenset[str]) -> None:
        unread = fields.keys() - read_fields
        if unread <= self.row_fields or len(self.row_fields) >= _MAX_COLLECTED_NAMES:
            return
        self.row_fields |= {name for name in unread if fields[name] is not None}

    def add_conversation(self, row: MessagesRow) -> None:
        for message in row.messages:
            if len(message) > 2 and len(self.message_fields) < _MAX_COLLECTED_NAMES:
                self.message_fields |= message.keys() - _READ_MESSAGE_FIELDS
        if row.template_variables and len(self.template_variables) < _MAX_COLLECTED_NAMES:
            self.template_variables |= row.template_variables.keys()

    def ignored_by(self, template: Any) -> list[str]:
        """Return descriptions of the fields that neither the format nor the chat template reads.

        `template` is the text of the chat template, a mapping of names to texts, or None.
        """
        texts = template.values() if isinstance(template, dict) else [template or ""]
        words = {word for text in texts for word in re.findall(r"\w+", text)}
        return [
            *(quote(name) for name in sorted(self.row_fields)),
            *(f"{quote(name)} of messages" for name in sorted(self.message_fields - words)),
            *(f"{quote(name)} of chat_template_kwargs" for name in sorted(self.template_variables - words)),
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
"""Fields that are read, or refused if the chat template does not write them."""


def check_row_fields(fields: dict[str, Any], format_fields: Iterable[str]) -> None:
    """Refuse a field that would change the training of a conversation or completion, but is not in `format_fields`."""
    if _INSPECTED_FIELDS.isdisjoint(fields):
        return
    for name in _PREFERENCE_FIELDS:
        value = fields.get(name)
        if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false")):
            raise InvalidRowError(
                f"`{name}` is {str(value).lower()}, so the row is preference data (KTO), which is not trained; keep "
                f"the rows of good answers and take `{name}` out of them"
            )
    for name in _MEDIA_FIELDS:
        if fields.get(name):
            raise InvalidRowError(f"the row has `{name}`; {MEDIA_REMEDY}")
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
    mask, variables = (decode_json_field(fields.get(name), f"`{name}`") for name in CONVERSATION_ROW_FIELDS)
    if not mask and not variables:
        return row
    if not isinstance(row, MessagesRow):
        name = "loss_mask" if mask else "chat_template_kwargs"
        raise InvalidRowError(f"the row has a `{name}`, but is not a conversation; take it out, or write `messages`")
    return dataclasses.replace(
        row,
        messages=_apply_loss_mask(row.messages, mask) if mask else row.messages,
        template_variables=_check_variables(variables) if variables else None,
    )


def _apply_loss_mask(messages: list[Message], mask: Any) -> list[Message]:
    """Exclude messages whose flag in LLaMA-Factory's `loss_mask` is 0. The system message may have no flag."""
    if not isinstance(mask, list) or not all(isinstance(flag, bool | int | float) and flag in (0, 1) for flag in mask):
        raise InvalidRowError("`loss_mask` is not a list of 0 and 1; write one of them for each message")
    if len(mask) == len(messages) - 1 and messages[0]["role"] == "system":
        mask = [1, *mask]
    if len(mask) != len(messages):
        raise InvalidRowError(
            f"`loss_mask` has {len(mask)} items for {len(messages)} messages; write one for each message"
        )
    return [message if flag else {**message, "train": False} for message, flag in zip(messages, mask, strict=True)]


def _check_variables(variables: Any) -> dict[str, Any]:
    if not isinstance(variables, dict):
        raise InvalidRowError(f"`chat_template_kwargs` is {json_type_name(variables)}; write an object")
    check_json_value(variables, "`chat_template_kwargs`")
    reserved = next((name for name in _RESERVED_VARIABLES if name in variables), None)
    if reserved is not None:
        raise InvalidRowError(
            f"`chat_template_kwargs` holds `{reserved}`, which comes from the row itself; take it out"
        )
    return variables
