"""JSON from text: strictly what the standard allows, and in words what is wrong."""

from __future__ import annotations

import json
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NoReturn


class NonFiniteNumberError(ValueError):
    """NaN or Infinity stands where JSON has a number or null."""


def _no_constant(name: str) -> NoReturn:
    raise NonFiniteNumberError(f"{name} is no number in JSON")


STRICT_JSON_DECODER = json.JSONDecoder(parse_constant=_no_constant)
"""Python's own takes NaN and Infinity, which no other reader does."""

LENIENT_JSON_DECODER = json.JSONDecoder(parse_int=len)
"""Takes NaN and numbers of any length: it finds where a value ends that `STRICT_JSON_DECODER` refuses."""


def parse_json(text: str) -> Any:
    """The value that the text holds.

    Raises:
        ValueError: what is wrong, without the text itself.
    """
    try:
        return STRICT_JSON_DECODER.decode(text)
    except NonFiniteNumberError:
        raise NonFiniteNumberError(_locate_constant(text)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(json_error_reason(error)) from None


class _NonFiniteConstant(str):
    """The name of a constant, in its place."""

    __slots__ = ()


def _locate_constant(text: str) -> str:
    """Say where the first constant stands: '`scores[2].mean` is NaN, which is no number in JSON'."""
    pending: list[tuple[str, Any]] = [("", json.loads(text, parse_constant=_NonFiniteConstant, parse_int=len))]
    while pending:  # a tree may be as deep as Python's stack
        where, value = pending.pop()
        if isinstance(value, _NonFiniteConstant):
            name = where.removeprefix(".")[:80]
            return (
                f"`{name}` is {value}, which is no number in JSON"
                if name.isprintable() and name
                else f"{value} is no number in JSON"
            )
        inner: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            inner = [(f"{where}.{key}", child) for key, child in value.items()]
        elif isinstance(value, list):
            inner = [(f"{where}[{index}]", child) for index, child in enumerate(value)]
        pending += reversed(inner)
    raise AssertionError("the text has no constant")


def json_error_reason(error: ValueError | RecursionError, start: int = 0) -> str:
    """What a decoder complains of, in words; `start` is the position of the value in the text that it was given."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos - start + 1}"
    if "digits" in str(error):  # Python's remedy is none for a user
        return "a number of more than 4300 digits"
    return str(error)


def load_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file; empty if it cannot be read or holds something else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
