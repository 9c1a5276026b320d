"""Strict JSON parsing with error messages that a user can act on."""

from __future__ import annotations

import json
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NoReturn


class NonFiniteNumberError(ValueError):
    """JSON text holds NaN or Infinity, which JSON does not have."""


def _no_constant(name: str) -> NoReturn:
    raise NonFiniteNumberError(f"{name} is not a number in JSON")


STRICT_JSON_DECODER = json.JSONDecoder(parse_constant=_no_constant)
"""Decoder that refuses NaN and Infinity. Python's default accepts them, unlike other readers."""

LENIENT_JSON_DECODER = json.JSONDecoder(parse_int=len)
"""Decoder that accepts NaN and numbers of any length, to find the end of a value that the strict decoder refuses."""


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is not strict JSON. The message does not quote it.
    """
    try:
        return STRICT_JSON_DECODER.decode(text)
    except NonFiniteNumberError:
        raise NonFiniteNumberError(locate_constant(text)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(json_error_reason(error)) from None


class _NonFiniteConstant(str):
    __slots__ = ()


def locate_constant(text: str) -> str:
    """Return the message that locates the first constant: '`scores[2].mean` is NaN, which is not a number in JSON'."""
    pending: list[tuple[str, Any]] = [("", json.loads(text, parse_constant=_NonFiniteConstant, parse_int=len))]
    while pending:  # Recursion could exceed Python's stack.
        where, value = pending.pop()
        if isinstance(value, _NonFiniteConstant):
            name = where.removeprefix(".")[:80]
            return (
                f"`{name}` is {value}, which is not a number in JSON"
                if name.isprintable() and name
                else f"{value} is not a number in JSON"
            )
        inner: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            inner = [(f"{where}.{key}", child) for key, child in value.items()]
        elif isinstance(value, list):
            inner = [(f"{where}[{index}]", child) for index, child in enumerate(value)]
        pending += reversed(inner)
    raise AssertionError("the text has no constant")


def json_error_reason(error: ValueError | RecursionError, start: int = 0) -> str:
    """Return a decoder's error in plain words. `start` is the position of the value in the decoder's text."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos - start + 1}"
    if "digits" in str(error):  # A user cannot apply Python's remedy.
        return "a number of more than 4300 digits"
    return str(error)


def load_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file; empty if the file cannot be read or holds something else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}
