"""The shapes that rows come in, and what each becomes."""

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
    """A way to write rows."""

    format: DataFormat
    fields: tuple[str, ...]
    """What every row of it has, and by which it is told."""
    row: Callable[[str, dict[str, Any]], SourceRow]
    """What becomes of the place and the fields of a row; raises `InvalidRowError`."""
    gather: Callable[[Iterator[RawRow | BadRow]], Iterator[RawRow | BadRow]] | None = None
    """What makes one row of several, before."""
    optional_fields: tuple[str, ...] = ()
    """Fields that a row may have besides."""
    applies_row_fields: bool = False
    """The row says by fields of its own what is asked and what is answered."""


def parse_rows(
    records: Iterator[RawRow | BadRow],
    format: DataFormat,
    format_reason: str,
    unread_fields: UnreadFields | None = None,
) -> Iterator[SourceRow | BadRow]:
    """The rows of a source.

    Args:
        records: what its files hold.
        format: its shape; auto: that of the first row that has one.
        format_reason: who says so, for the complaint about a row that has another: 'data.format is text'.
        unread_fields: where the fields that no format reads are collected.

    Raises:
        UserError: no row has a known shape.
    """
    unread_fields = UnreadFields() if unread_fields is None else unread_fields
    unknown: BadRow | None = None
    for record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        place, fields = record
        shape = _match_format(fields, format)
        if shape:
            if format == "auto":
                format_reason = f"the first row has it: {place}"
            yield from _parse_matched_rows(chain([record], records), shape, format_reason, unread_fields)
            return
        bad = BadRow(place, _unknown_format_reason(fields))
        yield bad
        unknown = unknown or bad
    if unknown:
        raise unknown.error()


def _match_format(fields: dict[str, Any], format: DataFormat) -> RowFormat | None:
    """The first shape whose fields are all there; of a format that is given, the one with most of them."""
    if format != "auto":
        shapes = [shape for shape in ROW_FORMATS if shape.format == format]
        return max(shapes, key=lambda shape: len(fields.keys() & set(shape.fields)))
    return next((shape for shape in ROW_FORMATS if fields.keys() >= set(shape.fields)), None)


def _unknown_format_reason(fields: dict[str, Any]) -> str:
    """Say what is wrong with a row of no format. A field that holds rows is no row's field."""
    for name, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and _match_format(value[0], "auto"):
            return f"it is no row, and its field {quote(name)} holds rows; write that list alone, as a file of its own"
    return f"its fields ({join_names(fields)}) are of no known format; rename them to those of {_KNOWN_FORMATS}"


def _parse_matched_rows(
    records: Iterator[RawRow | BadRow], shape: RowFormat, why: str, names: UnreadFields
) -> Iterator[SourceRow | BadRow]:
    checked = _check_fields(records, shape, why, names)
    for record in shape.gather(checked) if shape.gather else checked:
        if isinstance(record, BadRow):
            yield record
            continue
        place, fields = record
        try:
            row = shape.row(place, fields)
            if shape.applies_row_fields:
                row = apply_row_fields(row, fields)
        except InvalidRowError as error:
            yield BadRow(place, str(error))
            continue
        if isinstance(row, MessagesRow):
            names.add_conversation(row)
        yield row


def _check_fields(
    records: Iterator[RawRow | BadRow], shape: RowFormat, why: str, names: UnreadFields
) -> Iterator[RawRow | BadRow]:
    read = frozenset((*shape.fields, *shape.optional_fields))
    for record in records:
        if not isinstance(record, BadRow):
            place, fields = record
            missing = next((field for field in shape.fields if field not in fields), None)
            if missing is not None:
                record = BadRow(place, f"the row has no `{missing}` ({why}); add it or take the row out")
            else:
                try:
                    if shape.applies_row_fields:
                        check_row_fields(fields, shape.optional_fields)
                    names.add_row(fields, read)
                except InvalidRowError as error:
                    record = BadRow(place, str(error))
        yield record


def _messages(place: str, fields: dict[str, Any]) -> MessagesRow:
    messages = prepend_system_message(parse_messages(fields["messages"], "messages"), fields.get("system"))
    return MessagesRow(place, messages, parse_tools(fields.get("tools")))


def _prompt_completion(place: str, fields: dict[str, Any]) -> CompletionRow | MessagesRow:
    prompt, completion = fields["prompt"], fields["completion"]
    system = fields.get("system")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        if system is not None and require_str(system, "`system`").strip():
            raise InvalidRowError("the row has a `system`, and its prompt is a text; write it into the prompt")
        return CompletionRow(place, require_str(prompt, "`prompt`"), require_nonempty_str(completion, "`completion`"))
    # a conversation in two parts, as TRL has it
    prompt_messages = prepend_system_message(parse_messages(prompt, "prompt", default_train=False), system, train=False)
    return MessagesRow(
        place,
        prompt_messages + parse_messages(completion, "completion", default_train=True),
        parse_tools(fields.get("tools")),
    )


def _alpaca(place: str, fields: dict[str, Any]) -> MessagesRow:
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
            raise InvalidRowError(f"`history`: item {number} is no pair; write a list of question and answer")
        messages += _question_and_answer(
            require_str(pair[0], f"`history`: question {number}"), pair[1], f"`history`: answer {number}"
        )
    messages += _question_and_answer(require_nonempty_str(instruction, "`instruction`"), fields["output"], "`output`")
    return MessagesRow(place, prepend_system_message(messages, fields.get("system")))


def _question_and_answer(question: str, answer: Any, where: str) -> list[Message]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": require_nonempty_str(answer, where)},
    ]


_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")


def _hh_rlhf(place: str, fields: dict[str, Any]) -> MessagesRow:
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
    return MessagesRow(place, messages)


def _flan(place: str, fields: dict[str, Any]) -> CompletionRow:
    return CompletionRow(
        place, require_str(fields["inputs"], "`inputs`"), require_nonempty_str(fields["targets"], "`targets`")
    )


def _longform(place: str, fields: dict[str, Any]) -> MessagesRow:
    return MessagesRow(
        place, _question_and_answer(require_nonempty_str(fields["input"], "`input`"), fields["output"], "`output`")
    )


def _text(place: str, fields: dict[str, Any]) -> TextRow:
    return TextRow(place, require_nonempty_str(fields["text"], "`text`"))


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
"""In order of priority, where a row has the fields of several: Stanford's Alpaca has a `text` too, and OASST's flat
table; what a conversation is rendered to comes last."""

_KNOWN_FORMATS = ", ".join(f"{shape.format} ({join_names(shape.fields)})" for shape in ROW_FORMATS)
