"""The shapes that rows come in, and what each becomes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from qlora_dist.config.schema import Format
from qlora_dist.data import oasst
from qlora_dist.data.messages import conversation, tools
from qlora_dist.data.row_fields import HONOURED, FieldNames, check_row_fields, with_row_fields
from qlora_dist.data.sharegpt import sharegpt_row, with_system
from qlora_dist.data.source_row import BadRow, CompletionRow, Message, MessagesRow, Row, TextRow
from qlora_dist.data.validate import Record, Unusable, filled, kind, listed, quoted, string


class Shape(NamedTuple):
    """A way to write rows."""

    format: Format
    fields: tuple[str, ...]
    """What every row of it has, and by which it is told."""
    row: Callable[[str, dict[str, Any]], Row]
    """What becomes of the place and the fields of a row; raises `Unusable`."""
    gather: Callable[[Iterator[Record | BadRow]], Iterator[Record | BadRow]] | None = None
    """What makes one row of several, before."""
    optional: tuple[str, ...] = ()
    """Fields that a row may have besides."""
    asks: bool = False
    """The row says by fields of its own what is asked and what is answered."""


def typed_rows(
    records: Iterator[Record | BadRow], format: Format, why: str, names: FieldNames | None = None
) -> Iterator[Row | BadRow]:
    """The rows of a source.

    Args:
        records: what its files hold.
        format: its shape; auto: that of the first row that has one.
        why: who says so, for the complaint about a row that has another: 'data.format is text'.
        names: where the fields that no format reads are collected.

    Raises:
        UserError: no row has a known shape.
    """
    names = FieldNames() if names is None else names
    unknown: BadRow | None = None
    for record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        place, fields = record
        shape = _shape(fields, format)
        if shape:
            if format == "auto":
                why = f"the first row has it: {place}"
            yield from _shaped(chain([record], records), shape, why, names)
            return
        bad = BadRow(place, _unknown(fields))
        yield bad
        unknown = unknown or bad
    if unknown:
        raise unknown.error()


def _shape(fields: dict[str, Any], format: Format) -> Shape | None:
    """The first shape whose fields are all there; of a format that is given, the one with most of them."""
    if format != "auto":
        shapes = [shape for shape in SHAPES if shape.format == format]
        return max(shapes, key=lambda shape: len(fields.keys() & set(shape.fields)))
    return next((shape for shape in SHAPES if fields.keys() >= set(shape.fields)), None)


def _unknown(fields: dict[str, Any]) -> str:
    """Say what is wrong with a row of no format. A field that holds rows is no row's field."""
    for name, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and _shape(value[0], "auto"):
            return f"it is no row, and its field {quoted(name)} holds rows; write that list alone, as a file of its own"
    return f"its fields ({listed(fields)}) are of no known format; rename them to those of {_KNOWN}"


def _shaped(records: Iterator[Record | BadRow], shape: Shape, why: str, names: FieldNames) -> Iterator[Row | BadRow]:
    whole = _with_fields(records, shape, why, names)
    for record in shape.gather(whole) if shape.gather else whole:
        if isinstance(record, BadRow):
            yield record
            continue
        place, fields = record
        try:
            row = shape.row(place, fields)
            if shape.asks:
                row = with_row_fields(row, fields)
        except Unusable as error:
            yield BadRow(place, str(error))
            continue
        if isinstance(row, MessagesRow):
            names.add_conversation(row)
        yield row


def _with_fields(
    records: Iterator[Record | BadRow], shape: Shape, why: str, names: FieldNames
) -> Iterator[Record | BadRow]:
    read = frozenset((*shape.fields, *shape.optional))
    for record in records:
        if not isinstance(record, BadRow):
            place, fields = record
            missing = next((field for field in shape.fields if field not in fields), None)
            if missing is not None:
                record = BadRow(place, f"the row has no `{missing}` ({why}); add it or take the row out")
            else:
                try:
                    if shape.asks:
                        check_row_fields(fields, shape.optional)
                    names.add_row(fields, read)
                except Unusable as error:
                    record = BadRow(place, str(error))
        yield record


def _messages(place: str, fields: dict[str, Any]) -> MessagesRow:
    messages = with_system(conversation(fields["messages"], "messages"), fields.get("system"))
    return MessagesRow(place, messages, tools(fields.get("tools")))


def _prompt_completion(place: str, fields: dict[str, Any]) -> CompletionRow | MessagesRow:
    prompt, completion = fields["prompt"], fields["completion"]
    system = fields.get("system")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        if system is not None and string(system, "`system`").strip():
            raise Unusable("the row has a `system`, and its prompt is a text; write it into the prompt")
        return CompletionRow(place, string(prompt, "`prompt`"), filled(completion, "`completion`"))
    # a conversation in two parts, as TRL has it
    asked = with_system(conversation(prompt, "prompt", trained=False), system, trained=False)
    return MessagesRow(place, asked + conversation(completion, "completion", trained=True), tools(fields.get("tools")))


def _alpaca(place: str, fields: dict[str, Any]) -> MessagesRow:
    instruction = string(fields["instruction"], "`instruction`")
    given = fields.get("input")
    if given is not None and string(given, "`input`").strip():
        instruction = f"{instruction}\n\n{given}" if instruction else given
    messages: list[Message] = []
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise Unusable(f"`history` is {kind(history)}; write a list of pairs of question and answer")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Unusable(f"`history`: item {number} is no pair; write a list of question and answer")
        messages += _turn(string(pair[0], f"`history`: question {number}"), pair[1], f"`history`: answer {number}")
    messages += _turn(filled(instruction, "`instruction`"), fields["output"], "`output`")
    return MessagesRow(place, with_system(messages, fields.get("system")))


def _turn(question: str, answer: Any, where: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": filled(answer, where)}]


_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")


def _hh_rlhf(place: str, fields: dict[str, Any]) -> MessagesRow:
    if isinstance(fields["chosen"], list):
        raise Unusable(
            "`chosen` is a list, so the row is preference data, of which only HH-RLHF's texts are read; write the "
            "conversation that ends with the chosen answer as `messages`"
        )
    before, *turns = _SPEAKER.split(string(fields["chosen"], "`chosen`"))
    if before.strip() or not turns:
        raise Unusable(
            '`chosen` does not start with a turn; write "\\n\\nHuman: ...\\n\\nAssistant: ...", or `messages` instead'
        )
    messages: list[Message] = []
    for speaker, content in zip(turns[::2], turns[1::2], strict=True):
        if speaker == "Human":
            messages.append({"role": "user", "content": content})
        else:
            where = f"`chosen`: turn {len(messages) + 1}"
            messages.append({"role": "assistant", "content": filled(content, where)})
    return MessagesRow(place, messages)


def _flan(place: str, fields: dict[str, Any]) -> CompletionRow:
    return CompletionRow(place, string(fields["inputs"], "`inputs`"), filled(fields["targets"], "`targets`"))


def _longform(place: str, fields: dict[str, Any]) -> MessagesRow:
    return MessagesRow(place, _turn(filled(fields["input"], "`input`"), fields["output"], "`output`"))


def _text(place: str, fields: dict[str, Any]) -> TextRow:
    return TextRow(place, filled(fields["text"], "`text`"))


_OF_CONVERSATIONS = ("system", *HONOURED)

SHAPES = (
    Shape("messages", ("messages",), _messages, optional=("tools", *_OF_CONVERSATIONS), asks=True),
    Shape("sharegpt", ("conversations",), sharegpt_row, optional=("tools", *_OF_CONVERSATIONS), asks=True),
    Shape(
        "alpaca",
        ("instruction", "output"),
        _alpaca,
        optional=("input", "history", *_OF_CONVERSATIONS),
        asks=True,
    ),
    Shape(
        "prompt-completion",
        ("prompt", "completion"),
        _prompt_completion,
        optional=("tools", *_OF_CONVERSATIONS),
        asks=True,
    ),
    Shape("oasst", ("message_tree_id", "prompt"), oasst.oasst_row),
    Shape(
        "oasst",
        ("message_id", "parent_id", "role", "text"),
        oasst.oasst_row,
        oasst.trees,
        optional=("message_tree_id", "rank", "deleted", "review_result"),
    ),
    Shape("hh-rlhf", ("chosen",), _hh_rlhf),
    Shape("flan", ("inputs", "targets"), _flan),
    Shape("longform", ("input", "output"), _longform),
    Shape("text", ("text",), _text),
)
"""In order of priority, where a row has the fields of several: Stanford's Alpaca has a `text` too, and OASST's flat
table; what a conversation is rendered to comes last."""

_KNOWN = ", ".join(f"{shape.format} ({listed(shape.fields)})" for shape in SHAPES)
