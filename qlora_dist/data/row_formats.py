"""Row formats, and the conversion of their rows to conversations, completions and texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from qlora_dist.config.sections import DataFormat
from qlora_dist.data import oasst
from qlora_dist.data.messages import parse_messages, parse_tools
from qlora_dist.data.row_fields import CONVERSATION_ROW_FIELDS, UnreadFields, apply_row_fields, check_row_fields
from qlora_dist.data.sharegpt import parse_sharegpt_row, prepend_system_message
from qlora_dist.data.source_row import BadRow, CompletionRow, Message, MessagesRow, SourceRow, TextRow
from qlora_dist.data.validate import (
    InvalidRowError,
    RawRow,
    join_names,
    json_type_name,
    quote,
    require_nonempty_str,
    require_str,
)


class RowFormat(NamedTuple):
    """Format of a row."""

    name: DataFormat
    required_fields: tuple[str, ...]
    """Fields that every row of the format has. They identify the format."""
    parse: Callable[[str, dict[str, Any]], SourceRow]
    """Function that converts the location and fields of a row; it raises `InvalidRowError`."""
    assemble: Callable[[Iterator[RawRow | BadRow]], Iterator[RawRow | BadRow]] | None = None
    """Function that joins several raw rows to one before they are parsed."""
    optional_fields: tuple[str, ...] = ()
    """Other fields that the format reads."""
    applies_row_fields: bool = False
    """True if `CONVERSATION_ROW_FIELDS` apply, because the row's own fields are its messages."""


def parse_rows(
    records: Iterator[RawRow | BadRow],
    format: DataFormat,
    format_reason: str,
    unread_fields: UnreadFields | None = None,
) -> Iterator[SourceRow | BadRow]:
    """Yield the parsed rows of a source. The format `auto` means that of the first row with a known format.

    `format_reason` is the origin of the format, quoted in errors about other rows: 'data.format is text'. If no row has
    a known format, the first is raised as an error.
    """
    unread_fields = UnreadFields() if unread_fields is None else unread_fields
    unknown: BadRow | None = None
    for record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        location, fields = record
        row_format = _match_format(fields, format)
        if row_format:
            if format == "auto":
                format_reason = f"the first row has it: {location}"
            yield from _parse_matched_rows(chain([record], records), row_format, format_reason, unread_fields)
            return
        bad = BadRow(location, _unknown_format_reason(fields))
        yield bad
        unknown = unknown or bad
    if unknown:
        raise unknown.to_error()


def _match_format(fields: dict[str, Any], format: DataFormat) -> RowFormat | None:
    """Return the first format whose fields the row has.

    A given format may have variants; the one with the most fields in common is returned.
    """
    if format != "auto":
        row_formats = [row_format for row_format in ROW_FORMATS if row_format.name == format]
        return max(row_formats, key=lambda row_format: len(fields.keys() & set(row_format.required_fields)))
    return next((row_format for row_format in ROW_FORMATS if fields.keys() >= set(row_format.required_fields)), None)


def _unknown_format_reason(fields: dict[str, Any]) -> str:
    """Return why a row has no known format. A field that holds rows is a list that should be a file of its own."""
    for name, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and _match_format(value[0], "auto"):
            return (
                f"it is not a row, but its field {quote(name)} holds rows; write that list alone, as a file of its own"
            )
    return f"its fields ({join_names(fields)}) match no known format; rename them to the fields of {_KNOWN_FORMATS}"


def _parse_matched_rows(
    records: Iterator[RawRow | BadRow], row_format: RowFormat, format_reason: str, unread_fields: UnreadFields
) -> Iterator[SourceRow | BadRow]:
    checked = _check_fields(records, row_format, format_reason, unread_fields)
    for record in row_format.assemble(checked) if row_format.assemble else checked:
        if isinstance(record, BadRow):
            yield record
            continue
        location, fields = record
        try:
            row = row_format.parse(location, fields)
            if row_format.applies_row_fields:
                row = apply_row_fields(row, fields)
        except InvalidRowError as error:
            yield BadRow(location, str(error))
            continue
        if isinstance(row, MessagesRow):
            unread_fields.add_conversation(row)
        yield row


def _check_fields(
    records: Iterator[RawRow | BadRow], row_format: RowFormat, format_reason: str, unread_fields: UnreadFields
) -> Iterator[RawRow | BadRow]:
    read_fields = frozenset((*row_format.required_fields, *row_format.optional_fields))
    for record in records:
        if not isinstance(record, BadRow):
            location, fields = record
            missing = next((field for field in row_format.required_fields if field not in fields), None)
            if missing is not None:
                record = BadRow(location, f"the row has no `{missing}` ({format_reason}); add it or take the row out")
            else:
                try:
                    if row_format.applies_row_fields:
                        check_row_fields(fields, row_format.optional_fields)
                    unread_fields.add_row(fields, read_fields)
                except InvalidRowError as error:
                    record = BadRow(location, str(error))
        yield record


def _messages(location: str, fields: dict[str, Any]) -> MessagesRow:
    messages = prepend_system_message(parse_messages(fields["messages"], "messages"), fields.get("system"))
    return MessagesRow(location, messages, parse_tools(fields.get("tools")))


def _prompt_completion(location: str, fields: dict[str, Any]) -> CompletionRow | MessagesRow:
    prompt, completion = fields["prompt"], fields["completion"]
    system = fields.get("system")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        if system is not None and require_str(system, "`system`").strip():
            raise InvalidRowError("the row has a `system`, and its prompt is a text; write it into the prompt")
        return CompletionRow(
            location, require_str(prompt, "`prompt`"), require_nonempty_str(completion, "`completion`")
        )
    # A conversation in two parts, as in TRL.
    prompt_messages = prepend_system_message(parse_messages(prompt, "prompt", default_train=False), system, train=False)
    return MessagesRow(
        location,
        prompt_messages + parse_messages(completion, "completion", default_train=True),
        parse_tools(fields.get("tools")),
    )


def _alpaca(location: str, fields: dict[str, Any]) -> MessagesRow:
    instruction = require_str(fields["instruction"], "`instruction`")
    input_text = fields.get("input")
    if input_text is not None and require_str(input_text, "`input`").strip():
        instruction = f"{instruction}\n\n{input_text}" if instruction else input_text
    messages: list[Message] = []
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise InvalidRowError(f"`history` is {json_type_name(history)}; write a list of pairs of question and answer")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InvalidRowError(f"`history`: item {number} is not a pair; write a list of question and answer")
        messages += _question_and_answer(
            require_str(pair[0], f"`history`: question {number}"), pair[1], f"`history`: answer {number}"
        )
    messages += _question_and_answer(require_nonempty_str(instruction, "`instruction`"), fields["output"], "`output`")
    return MessagesRow(location, prepend_system_message(messages, fields.get("system")))


def _question_and_answer(question: str, answer: Any, where: str) -> list[Message]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": require_nonempty_str(answer, where)},
    ]


_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")


def _hh_rlhf(location: str, fields: dict[str, Any]) -> MessagesRow:
    if isinstance(fields["chosen"], list):
        raise InvalidRowError(
            "`chosen` is a list, so the row is preference data, of which only HH-RLHF's texts are read; write the "
            "conversation that ends with the chosen answer as `messages`"
        )
    before, *turns = _SPEAKER.split(require_str(fields["chosen"], "`chosen`"))
    if before.strip() or not turns:
        raise InvalidRowError(
            '`chosen` does not start with a turn; write "\\n\\nHuman: ...\\n\\nAssistant: ...", or `messages` instead'
        )
    messages: list[Message] = []
    for speaker, content in zip(turns[::2], turns[1::2], strict=True):
        if speaker == "Human":
            messages.append({"role": "user", "content": content})
        else:
            where = f"`chosen`: turn {len(messages) + 1}"
            messages.append({"role": "assistant", "content": require_nonempty_str(content, where)})
    return MessagesRow(location, messages)


def _flan(location: str, fields: dict[str, Any]) -> CompletionRow:
    return CompletionRow(
        location, require_str(fields["inputs"], "`inputs`"), require_nonempty_str(fields["targets"], "`targets`")
    )


def _longform(location: str, fields: dict[str, Any]) -> MessagesRow:
    return MessagesRow(
        location, _question_and_answer(require_nonempty_str(fields["input"], "`input`"), fields["output"], "`output`")
    )


def _text(location: str, fields: dict[str, Any]) -> TextRow:
    return TextRow(location, require_nonempty_str(fields["text"], "`text`"))


_CONVERSATION_FIELDS = ("system", *CONVERSATION_ROW_FIELDS)

ROW_FORMATS = (
    RowFormat(
        "messages", ("messages",), _messages, optional_fields=("tools", *_CONVERSATION_FIELDS), applies_row_fields=True
    ),
    RowFormat(
        "sharegpt",
        ("conversations",),
        parse_sharegpt_row,
        optional_fields=("tools", *_CONVERSATION_FIELDS),
        applies_row_fields=True,
    ),
    RowFormat(
        "alpaca",
        ("instruction", "output"),
        _alpaca,
        optional_fields=("input", "history", *_CONVERSATION_FIELDS),
        applies_row_fields=True,
    ),
    RowFormat(
        "prompt-completion",
        ("prompt", "completion"),
        _prompt_completion,
        optional_fields=("tools", *_CONVERSATION_FIELDS),
        applies_row_fields=True,
    ),
    RowFormat("oasst", ("message_tree_id", "prompt"), oasst.parse_oasst_tree),
    RowFormat(
        "oasst",
        ("message_id", "parent_id", "role", "text"),
        oasst.parse_oasst_tree,
        oasst.assemble_oasst_trees,
        optional_fields=("message_tree_id", "rank", "deleted", "review_result"),
    ),
    RowFormat("hh-rlhf", ("chosen",), _hh_rlhf),
    RowFormat("flan", ("inputs", "targets"), _flan),
    RowFormat("longform", ("input", "output"), _longform),
    RowFormat("text", ("text",), _text),
)
"""Formats in order of priority, because a row may have the fields of several. Stanford's Alpaca and OASST's flat table
also have a `text`, so `text` comes last."""

_KNOWN_FORMATS = ", ".join(
    f"{row_format.name} ({join_names(row_format.required_fields)})" for row_format in ROW_FORMATS
)
