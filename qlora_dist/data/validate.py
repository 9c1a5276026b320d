"""A row before it has a format: where it stands and what it holds. And the words for what is wrong with a value."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

RawRow = tuple[str, dict[str, Any]]
"""The place ('FILE, line N') and the fields of a row."""

MAX_JSON_DEPTH = 100
"""Levels of nesting that a template's `tojson` is trusted with."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


class InvalidRowError(Exception):
    """What is wrong with a row, and the remedy: the `reason` of a `BadRow`."""


def require_str(value: Any, where: str) -> str:
    """The value, if it is text.

    Raises:
        Unusable: it is something else, or text that has no UTF-8.
    """
    if not isinstance(value, str):
        raise InvalidRowError(f"{where} is {json_type_name(value)}; write a string")
    if not is_valid_utf8(value):
        raise InvalidRowError(f"{where} holds half of a surrogate pair; write the whole character")
    return value


def is_valid_utf8(value: str) -> bool:
    """Whether it is text. Half of a surrogate pair is valid JSON and none; a tokenizer would not say where."""
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def require_nonempty_str(value: Any, where: str) -> str:
    """The value, if it is text of more than white space: training on less teaches silence.

    Raises:
        Unusable: it is not.
    """
    text = require_str(value, where)
    if not text.strip():
        raise InvalidRowError(f"{where} is empty; fill it or take the row out")
    return text


def check_json_value(value: Any, where: str) -> None:
    """Raise `InvalidRowError` unless a template can write the value as JSON, which is how it is found out.

    A value that is only just not too deep for us may be so further down the stack: there is a margin.
    """
    try:
        text = _ENCODER.encode(value)
        text.encode("utf-8")
        is_too_deep = text.count("[") + text.count("{") > MAX_JSON_DEPTH and _nesting_depth(value) > MAX_JSON_DEPTH
    except UnicodeEncodeError:
        raise InvalidRowError(f"{where} holds half of a surrogate pair; write the whole character") from None
    except RecursionError:
        is_too_deep = True
    except (TypeError, ValueError) as error:  # a date, bytes; not a number
        raise InvalidRowError(f"{where} cannot be written as JSON ({error}); write what JSON knows") from None
    if is_too_deep:
        raise InvalidRowError(f"{where} is nested more than {MAX_JSON_DEPTH} levels deep; flatten it")


def _nesting_depth(value: Any) -> int:
    """Levels of nesting: 0 of a number, 1 of a list of numbers."""
    level, depth = [value], -1
    while level:
        depth += 1
        inner = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def json_type_name(value: Any) -> str:
    """What JSON calls the value."""
    if value is None:
        return "null"
    if isinstance(value, bool):  # before int, which bool is
        return "a boolean"
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a value of the type {type(value).__name__}")  # Parquet knows dates and bytes


def quote(text: str) -> str:
    """A word of the user's, fit for a sentence: one line, printable, not too long."""
    return f"`{text[:40] if text[:40].isprintable() else ascii(text[:40])[1:-1]}{'...' if len(text) > 40 else ''}`"


def join_names(names: Iterable[str], max_names: int = 12) -> str:
    """The names one behind the other."""
    words = [quote(name) for name in names]
    more = f" and {len(words) - max_names} more" if len(words) > max_names else ""
    return (", ".join(words[:max_names]) or "none") + more


def format_exception_message(error: Exception) -> str:
    """What a library says is wrong, fit for a sentence: one line, printable, not too long."""
    words = " ".join(str(error).split()).replace(". ", ": ")[:200].rstrip(".")
    return "".join(character if character.isprintable() else "?" for character in words) or type(error).__name__
