"""Rows from JSONL and JSON files, of which never more is held than a row or a piece of 256 KiB."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from json import JSONDecodeError
from typing import Any, BinaryIO

from qlora_dist.data.source_row import BadRow
from qlora_dist.data.strict_json import (
    LENIENT_JSON_DECODER,
    STRICT_JSON_DECODER,
    NonFiniteNumberError,
    json_error_reason,
    parse_json,
)
from qlora_dist.data.validate import RawRow, json_type_name
from qlora_dist.errors import UserError

MAX_ROW_SIZE = 16 << 20
"""Bytes of a line, and characters of a row in a JSON array. No conversation is that long; a file without line feeds
is."""
ROW_TOO_LONG_REASON = f"longer than {MAX_ROW_SIZE >> 20} MiB; cut it, or put each row in a line of its own"

_BLOCK_BYTES = 1 << 18
_SPACE = re.compile(r"[ \t\r\n]*")


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line; of one that is too long, its first LONGEST_ROW + 1 bytes."""
    number = 0
    while line := file.readline(MAX_ROW_SIZE + 1):
        number += 1
        if len(line) > MAX_ROW_SIZE:
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(_BLOCK_BYTES)
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def format_utf8_error(error: UnicodeDecodeError, byte_offset: int = 0) -> str:
    """The complaint about a byte, `byte_offset` bytes after what is meant by its position."""
    byte = error.object[error.start]
    return f"not UTF-8 (byte {byte:#04x} at position {byte_offset + error.start + 1}); save the file as UTF-8"


def read_jsonl_rows(name: str, file: BinaryIO) -> Iterator[RawRow | BadRow]:
    """One object per line; blank lines are skipped and counted."""
    for number, line in read_lines(file):
        if line.isspace():
            continue
        place = f"{name}, line {number}"
        if len(line) > MAX_ROW_SIZE:
            yield BadRow(place, f"the line is {ROW_TOO_LONG_REASON}")
            continue
        try:
            tree = parse_json(line.rstrip().decode("utf-8"))  # or a string cut off would be one with a line feed in it
        except UnicodeDecodeError as error:
            yield BadRow(place, format_utf8_error(error))
        except NonFiniteNumberError as error:
            yield BadRow(place, f"not valid JSON: {error}; write null there, or take the field out")
        except ValueError as error:
            yield BadRow(place, f"not valid JSON ({error}); write one complete JSON object per line")
        else:
            yield _record(tree, place, "write one JSON object per line, or call a file of one array .json")


def read_json_rows(name: str, file: BinaryIO) -> Iterator[RawRow | BadRow]:
    """One array of objects, or one object, which is a row or holds rows under names, or in truth JSONL.

    An array is read in pieces, an object whole.

    Raises:
        UserError: what cannot be blamed on one row, such as a bracket that is missing.
    """
    if file.read(_BLOCK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        file.seek(0)
        yield from _array(name, _decode_blocks(name, file))
        return
    file.seek(0)
    nonblank_lines = (line for _, line in read_lines(file) if not line.isspace())
    first, second = next(nonblank_lines, b""), next(nonblank_lines, b"")
    file.seek(0)
    if second and _is_object(first):
        yield from read_jsonl_rows(name, file)
    elif first:
        yield from _object(name, "".join(_decode_blocks(name, file)))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line.decode("utf-8")), dict)
    except ValueError:
        return False


def _object(name: str, text: str) -> Iterator[RawRow | BadRow]:
    try:
        tree = parse_json(text)
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON ({error}); write one array of objects") from None
    if not isinstance(tree, dict):
        raise UserError(f"{name}: holds {json_type_name(tree)}; write one array of objects")
    children = list(tree.values())
    rows = children if children and all(isinstance(child, dict) for child in children) else [tree]
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


def _decode_blocks(name: str, file: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done = 0
    while True:
        piece = file.read(_BLOCK_BYTES)
        done += len(piece)
        try:
            yield decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: {format_utf8_error(error, done - len(error.object))}") from None
        if not piece:
            return


def _array(name: str, pieces: Iterator[str]) -> Iterator[RawRow | BadRow]:
    window = _JSONCursor(pieces)
    window.take("[")
    row = 0
    closed = window.take("]")
    while not closed:
        row += 1
        place = f"{name}, row {row}"
        value, problem = window.value(place)
        if problem:
            yield BadRow(place, f"not valid JSON ({problem}); correct it or take the row out")
        else:
            yield _record(value, place, "write one array of objects")
        closed = window.take("]")
        if not closed and not window.take(","):
            raise UserError(f"{place}: neither a comma nor a bracket follows; write one complete array of objects")
    if window.peek():
        raise UserError(f"{name}: something follows the array of {row} rows; write one array of objects")


class _JSONCursor:
    """What has been read of a text and not yet been used: `text` from `at` on."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._blocks = pieces
        self._text = ""
        self._position = 0

    def peek(self) -> str:
        """The next character that is no white space, '' at the end."""
        while True:
            space = _SPACE.match(self._text, self._position)
            self._position = space.end() if space else self._position
            if self._position < len(self._text) or not self._read_more():
                return self._text[self._position : self._position + 1]

    def take(self, character: str) -> bool:
        """Step over this character, if it follows."""
        found = self.peek() == character
        self._position += found
        return found

    def value(self, place: str) -> tuple[Any, str | None]:
        """The value that follows, and why it is none in strict JSON, if so."""
        self.peek()
        while True:
            try:
                value, problem, end = _decode(self._text, self._position)
                # a number that ends where the text does might go on
                if end < len(self._text) or not self._read_more():
                    self._position = end
                    return value, problem
            except (JSONDecodeError, RecursionError) as error:
                if len(self._text) - self._position > MAX_ROW_SIZE:
                    raise UserError(f"{place}: not valid JSON, or {ROW_TOO_LONG_REASON}") from None
                if isinstance(error, RecursionError) or not self._read_more():
                    raise UserError(
                        f"{place}: not valid JSON ({json_error_reason(error, self._position)}), or the file was cut off; "
                        "write one array of objects"
                    ) from None

    def _read_more(self) -> bool:
        """Read as much again as there is, lest a long value be tried once per piece; False: there is no more."""
        parts = [self._text[self._position :]]
        needed = len(parts[0]) + 1
        while needed > 0 and (piece := next(self._blocks, None)) is not None:
            parts.append(piece)
            needed -= len(piece)
        self._text, self._position = "".join(parts), 0
        return len(parts) > 1


def _decode(text: str, start: int) -> tuple[Any, str | None, int]:
    try:
        value, end = STRICT_JSON_DECODER.raw_decode(text, start)
    except JSONDecodeError:
        raise
    except ValueError as error:
        end = LENIENT_JSON_DECODER.raw_decode(text, start)[1]
        problem = (
            _invalid_value_reason(text[start:end])
            if isinstance(error, NonFiniteNumberError)
            else json_error_reason(error)
        )
        return None, problem, end
    return value, None, end


def _invalid_value_reason(text: str) -> str:
    try:
        parse_json(text)
    except ValueError as error:
        return str(error)
    raise AssertionError("the value was refused before")


def _record(tree: Any, place: str, remedy: str) -> RawRow | BadRow:
    return (
        (place, tree) if isinstance(tree, dict) else BadRow(place, f"{json_type_name(tree)}, not an object; {remedy}")
    )
