"""Raw rows, and validation of their values with error messages for the user."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

RawRow = tuple[str, dict[str, Any]]
"""Location ('FILE, line N') and fields of a row."""

MAX_JSON_DEPTH = 100
"""Most levels of nesting of a value that a template writes with `tojson`."""

_JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


class InvalidRowError(Exception):
    """Row is invalid; the message names the problem and the remedy, and becomes the `reason` of a `BadRow`."""


def require_str(value: Any, where: str) -> str:
    """Return the value if it is a string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InvalidRowError(f"{where} is {json_type_name(value)}; write a string")
    if not is_valid_utf8(value):
        raise InvalidRowError(f"{where} holds half of a surrogate pair; write the whole character")
    return value


def is_valid_utf8(value: str) -> bool:
    """Return whether UTF-8 can encode the string. JSON may hold lone surrogates, which a tokenizer would refuse."""
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def require_nonempty_str(value: Any, where: str) -> str:
    """Return the value if it is text with more than white space. An empty completion would train an empty answer."""
    text = require_str(value, where)
    if not text.strip():
        raise InvalidRowError(f"{where} is empty; fill it or take the row out")
    return text


def check_json_value(value: Any, where: str) -> None:
    """Raise `InvalidRowError` unless a template can write the value as JSON.

    The limit leaves a margin, because templates render deeper in the call stack than this check.
    """
    try:
        text = _JSON_ENCODER.encode(value)
        text.encode("utf-8")
        is_too_deep = text.count("[") + text.count("{") > MAX_JSON_DEPTH and _nesting_depth(value) > MAX_JSON_DEPTH
    except UnicodeEncodeError:
        raise InvalidRowError(f"{where} holds half of a surrogate pair; write the whole character") from None
    except RecursionError:
        is_too_deep = True
    except (TypeError, ValueError) as error:  # It holds a date, bytes or NaN.
        raise InvalidRowError(f"{where} cannot be written as JSON ({error}); use JSON types only") from None
    if is_too_deep:
        raise InvalidRowError(f"{where} is nested more than {MAX_JSON_DEPTH} levels deep; flatten it")


def _nesting_depth(value: Any) -> int:
    """Return the levels of nesting: 0 for a number, 1 for a list of numbers."""
    level, depth = [value], -1
    while level:
        depth += 1
        inner = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def json_type_name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):  # This precedes int, because a bool is an int.
        return "a boolean"
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a value of the type {type(value).__name__}")  # Parquet has dates and bytes.


def quote(text: str) -> str:
    """Return text of the user in backticks: on one line, printable, and shortened."""
    return f"`{text[:40] if text[:40].isprintable() else ascii(text[:40])[1:-1]}{'...' if len(text) > 40 else ''}`"


def join_names(names: Iterable[str], max_names: int = 12) -> str:
    words = [quote(name) for name in names]
    more = f" and {len(words) - max_names} more" if len(words) > max_names else ""
    return (", ".join(words[:max_names]) or "none") + more


def format_exception_message(error: Exception) -> str:
    """Return a library's error message on one line, printable, and shortened."""
    words = " ".join(str(error).split()).replace(". ", ": ")[:200].rstrip(".")
    return "".join(character if character.isprintable() else "?" for character in words) or type(error).__name__
