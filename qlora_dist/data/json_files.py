"""Rows of JSONL and JSON files, read in blocks so that at most one row or 256 KiB are in memory."""

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
    locate_constant,
    parse_json,
)
from qlora_dist.data.validate import RawRow, json_type_name
from qlora_dist.errors import UserError

MAX_ROW_SIZE = 16 << 20
"""Most bytes of a line, and most characters of a row in a JSON array. Only files without line feeds exceed it."""
ROW_TOO_LONG_REASON = f"longer than {MAX_ROW_SIZE >> 20} MiB; cut it, or put each row in a line of its own"

_BLOCK_BYTES = 1 << 18
_SPACE = re.compile(r"[ \t\r\n]*")


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each line; a line that is too long is cut to MAX_ROW_SIZE + 1 bytes."""
    number = 0
    while line := file.readline(MAX_ROW_SIZE + 1):
        number += 1
        if len(line) > MAX_ROW_SIZE:
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(_BLOCK_BYTES)
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def format_utf8_error(error: UnicodeDecodeError, byte_offset: int = 0) -> str:
    """Return the message about an invalid byte. `byte_offset` is added to its position."""
    byte = error.object[error.start]
    return f"not UTF-8 (byte {byte:#04x} at position {byte_offset + error.start + 1}); save the file as UTF-8"


def read_jsonl_rows(name: str, file: BinaryIO) -> Iterator[RawRow | BadRow]:
    """Yield one row per line. Blank lines are skipped, but count as lines."""
    for number, line in read_lines(file):
        if line.isspace():
            continue
        location = f"{name}, line {number}"
        if len(line) > MAX_ROW_SIZE:
            yield BadRow(location, f"the line is {ROW_TOO_LONG_REASON}")
            continue
        try:
            # Without rstrip, a truncated string would be reported as one with a line feed.
            tree = parse_json(line.rstrip().decode("utf-8"))
        except UnicodeDecodeError as error:
            yield BadRow(location, format_utf8_error(error))
        except NonFiniteNumberError as error:
            yield BadRow(location, f"not valid JSON: {error}; write null there, or take the field out")
        except ValueError as error:
            yield BadRow(location, f"not valid JSON ({error}); write one complete JSON object per line")
        else:
            yield _to_row(tree, location, "write one JSON object per line, or name a file of one array .json")


def read_json_rows(name: str, file: BinaryIO) -> Iterator[RawRow | BadRow]:
    """Yield the rows of an array of objects, of one object, of an object of rows, or of JSONL under another name.

    An array is read in blocks, an object at once.
    """
    if file.read(_BLOCK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        file.seek(0)
        yield from _read_array(name, _decode_blocks(name, file))
        return
    file.seek(0)
    nonblank_lines = (line for _, line in read_lines(file) if not line.isspace())
    first, second = next(nonblank_lines, b""), next(nonblank_lines, b"")
    file.seek(0)
    if second and _is_object(first):
        yield from read_jsonl_rows(name, file)
    elif first:
        yield from _read_object(name, "".join(_decode_blocks(name, file)))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line.decode("utf-8")), dict)
    except ValueError:
        return False


def _read_object(name: str, text: str) -> Iterator[RawRow | BadRow]:
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
    bytes_read = 0
    while True:
        block = file.read(_BLOCK_BYTES)
        bytes_read += len(block)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: {format_utf8_error(error, bytes_read - len(error.object))}") from None
        if not block:
            return


def _read_array(name: str, blocks: Iterator[str]) -> Iterator[RawRow | BadRow]:
    cursor = _JSONCursor(blocks)
    cursor.consume("[")
    row = 0
    closed = cursor.consume("]")
    while not closed:
        row += 1
        location = f"{name}, row {row}"
        value, problem = cursor.read_value(location)
        if problem:
            yield BadRow(location, f"not valid JSON ({problem}); correct it or take the row out")
        else:
            yield _to_row(value, location, "write one array of objects")
        closed = cursor.consume("]")
        if not closed and not cursor.consume(","):
            raise UserError(f"{location}: neither a comma nor a bracket follows; write one complete array of objects")
    if cursor.peek():
        raise UserError(f"{name}: there is more text after the array of {row} rows; write one array of objects")


class _JSONCursor:
    """Unread text of a JSON file, which starts at `_position` in `_text`."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks = blocks
        self._text = ""
        self._position = 0

    def peek(self) -> str:
        """Return the next character that is not white space, '' at the end."""
        while True:
            match = _SPACE.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text) or not self._read_more():
                return self._text[self._position : self._position + 1]

    def consume(self, character: str) -> bool:
        is_next = self.peek() == character
        self._position += is_next
        return is_next

    def read_value(self, location: str) -> tuple[Any, str | None]:
        """Return the next value, or None and the reason why it is not strict JSON."""
        self.peek()
        while True:
            try:
                value, problem, end = _decode(self._text, self._position)
                # A number at the end of the text may continue in the next block.
                if end < len(self._text) or not self._read_more():
                    self._position = end
                    return value, problem
            except (JSONDecodeError, RecursionError) as error:
                if len(self._text) - self._position > MAX_ROW_SIZE:
                    raise UserError(f"{location}: not valid JSON, or {ROW_TOO_LONG_REASON}") from None
                if isinstance(error, RecursionError) or not self._read_more():
                    raise UserError(
                        f"{location}: not valid JSON ({json_error_reason(error, self._position)}), or the file is "
                        "truncated; write one array of objects"
                    ) from None

    def _read_more(self) -> bool:
        """Double the unread text, so that a long value is not parsed once per block. Return whether there was more."""
        parts = [self._text[self._position :]]
        needed = len(parts[0]) + 1
        while needed > 0 and (block := next(self._blocks, None)) is not None:
            parts.append(block)
            needed -= len(block)
        self._text, self._position = "".join(parts), 0
        return len(parts) > 1


def _decode(text: str, start: int) -> tuple[Any, str | None, int]:
    try:
        value, end = STRICT_JSON_DECODER.raw_decode(text, start)
    except JSONDecodeError:
        raise
    except ValueError as error:
        end = LENIENT_JSON_DECODER.raw_decode(text, start)[1]
        is_constant = isinstance(error, NonFiniteNumberError)
        return None, locate_constant(text[start:end]) if is_constant else json_error_reason(error), end
    return value, None, end


def _to_row(tree: Any, location: str, remedy: str) -> RawRow | BadRow:
    if isinstance(tree, dict):
        return location, tree
    return BadRow(location, f"{json_type_name(tree)}, not an object; {remedy}")
