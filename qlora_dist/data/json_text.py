"""JSON from text: strictly what the standard allows, and in words what is wrong."""

from __future__ import annotations

import json
from json import JSONDecodeError
from typing import Any, NoReturn


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


DECODER = json.JSONDecoder(parse_constant=_no_constant)
"""Python's own takes NaN and Infinity, which no other reader does."""

LENIENT = json.JSONDecoder(parse_int=len)
"""Takes NaN and numbers of any length: it finds where a value ends that `DECODER` refuses."""


def parse(text: str) -> Any:
    """The value that the text holds.

    Raises:
        ValueError: what is wrong, without the text itself.
    """
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(reason(error)) from None


def reason(error: ValueError | RecursionError, start: int = 0) -> str:
    """What a decoder complains of, in words; `start` is the position of the value in the text that it was given."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos - start + 1}"
    if "digits" in str(error):  # Python's remedy is none for a user
        return "a number of more than 4300 digits"
    return str(error)
