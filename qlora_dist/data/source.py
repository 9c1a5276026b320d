"""Reading JSONL: typed rows that know where they stand, and one sentence for each way a file can be wrong."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from qlora_dist.config import Format, SourceConfig
from qlora_dist.data.row import BadRow, Message, MessagesRow, Row, TextRow
from qlora_dist.errors import UserError


def read_rows(source: SourceConfig, default: Format) -> Iterator[Row | BadRow]:
    """The rows of a JSONL file; blank lines are skipped.

    Args:
        source: where they are.
        default: the field that is read, where the source has no format; auto: the one the first row has (`messages`, if
            it has both).

    Raises:
        UserError: a file that is missing, or without rows.
    """
    format = source.format or default
    field = None if format == "auto" else format
    reason = f"data.format is {format}"
    empty = True
    for number, line in _lines(source.path):
        place = f"{source.path}, line {number}"
        empty = False
        try:
            tree = _object(line, place)
            if field is None:
                field = _first_field(tree, place)
                reason = f"the first row has it: {place}"
            if field not in tree:
                raise UserError(f"{place}: the row has no `{field}` ({reason}); add it or take the row out")
            if field == "messages":
                yield MessagesRow(place, _messages(tree["messages"], place))
            else:
                yield TextRow(place, _string(tree["text"], f"{place}: `text`"))
        except UserError as error:
            yield BadRow(place, str(error).removeprefix(f"{place}: "))
    if empty:
        raise UserError(f"{source.path}: no rows; write one JSON object with `messages` or `text` per line")


def source_files(source: SourceConfig) -> list[Path]:
    """The files behind a source."""
    path = Path(source.path)
    if not path.exists():
        raise UserError(f"{path}: no such data file; give the path of a JSONL file")
    return [path]


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not blank."""
    try:
        # bytes, decoded line by line: a wrong byte is then the mistake of a line, not of the file
        with Path(path).open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file; give the path of a JSONL file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a JSONL file") from None


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        tree = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: not UTF-8 (byte {line[error.start]:#04x} at position {error.start + 1}); save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error}); write one complete JSON object per line") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{place}: {_kind(tree)}, not an object; write one JSON object with `messages` or `text` per line"
        )
    return tree


def _first_field(tree: dict[str, Any], place: str) -> Literal["messages", "text"]:
    if "messages" in tree:
        return "messages"
    if "text" in tree:
        return "text"
    fields = ", ".join(f"`{name}`" for name in tree) or "no field"
    raise UserError(f"{place}: the row has neither `messages` nor `text` (it has {fields}); rename or convert it")


def _messages(value: Any, place: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"{place}: `messages` is {_kind(value)}; write a list of objects with `role` and `content`")
    if not value:
        raise UserError(f"{place}: `messages` is empty; add a message or take the row out")
    for number, message in enumerate(value, start=1):
        where = f"{place}: message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{where} is {_kind(message)}; write an object with `role` and `content`")
        if message.get("tool_calls"):
            # templates want the arguments as an object, OpenAI writes a string: it would be rendered wrongly
            raise UserError(f"{where} has `tool_calls`, which are not supported; take the row out")
        for name in ("role", "content"):
            if name not in message:
                raise UserError(f"{where} has no `{name}`; give each message a `role` and a `content`")
            _string(message[name], f"{where}: `{name}`")
    return value


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} is {_kind(value)}; write a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # "\ud83d" alone is valid JSON and no text; a tokenizer would raise without saying where
        raise UserError(f"{where} holds half of a surrogate pair; write the whole character") from None
    return value


def _kind(value: Any) -> str:
    """What JSON calls the value."""
    if value is None:
        return "null"
    if isinstance(value, bool):  # before int, which bool is
        return "a boolean"
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds[type(value)]
