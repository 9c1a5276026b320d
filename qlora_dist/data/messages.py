"""Conversations in OpenAI's form, validated and converted to what chat templates expect."""

from __future__ import annotations

from typing import Any, TypeGuard

from qlora_dist.data.source_row import Message
from qlora_dist.data.strict_json import parse_json
from qlora_dist.data.validate import (
    InvalidRowError,
    check_json_value,
    is_valid_utf8,
    join_names,
    json_type_name,
    quote,
    require_nonempty_str,
    require_str,
)


def parse_messages(value: Any, field: str, default_train: bool | None = None) -> list[Message]:
    """Return the messages of a list or of its JSON text, whose name in the row is `field`."""
    value = decode_json_field(value, f"`{field}`")
    if not isinstance(value, list):
        raise InvalidRowError(
            f"`{field}` is {json_type_name(value)}; write a list of objects with `role` and `content`"
        )
    if not value:
        raise InvalidRowError(f"`{field}` is empty; add a message or take the row out")
    where = "message" if field == "messages" else f"`{field}`: message"
    return [parse_message(item, f"{where} {number}", default_train) for number, item in enumerate(value, start=1)]


def parse_message(item: Any, where: str, default_train: bool | None = None) -> Message:
    """Return the message with text as `content`, objects in `tool_calls`, a boolean `train` and no null.

    A trained answer without text is refused.
    """
    if default_train is None and _is_plain(item):
        return item
    if not isinstance(item, dict):
        raise InvalidRowError(f"{where} is {json_type_name(item)}; write an object with `role` and `content`")
    # Parquet gives all messages the same fields. Nulls are dropped, because templates test for `is defined`.
    parsed = {name: value for name, value in item.items() if value is not None}
    if "role" not in item:
        raise _missing_field_error("role", where)
    role = require_str(item["role"], f"{where}: `role`")
    calls = decode_json_field(parsed.pop("tool_calls", None), f"{where}: `tool_calls`")
    if calls:
        if not isinstance(calls, list):
            raise InvalidRowError(
                f"{where}: `tool_calls` is {json_type_name(calls)}; write a list of objects with `function`"
            )
        parsed["tool_calls"] = [
            parse_tool_call(call, f"{where}: tool call {number}") for number, call in enumerate(calls, start=1)
        ]
    default_train = _pop_train_flag(parsed, where, default_train)
    if default_train is not None:
        parsed["train"] = default_train
    if "content" in parsed or not (calls or "function_call" in parsed):
        if "content" not in item:
            raise _missing_field_error("content", where)
        content = parsed["content"] = _content(item["content"], f"{where}: `content`")
        if role == "assistant" and not calls and default_train is not False and not content.strip():
            raise InvalidRowError(f"{where}: the assistant's message is empty; give it `content`, or `train`: false")
    if parsed.keys() - _CHECKED_FIELDS:
        for name, value in parsed.items():
            require_str(name, f"{where}: a name")
            if name not in _CHECKED_FIELDS and isinstance(value, str | list | dict):
                check_json_value(value, f"{where}: {quote(name)}")
    return parsed


def _is_plain(item: Any) -> TypeGuard[Message]:
    """Return whether the message is a valid role and content, which is a fast path for nearly all messages."""
    if type(item) is not dict or len(item) != 2:
        return False
    role, content = item.get("role"), item.get("content")
    if type(role) is not str or type(content) is not str or not is_valid_utf8(role) or not is_valid_utf8(content):
        return False
    return role != "assistant" or (content != "" and not content.isspace())


_CHECKED_FIELDS = {"role", "content", "tool_calls", "train"}


def _missing_field_error(field: str, where: str) -> InvalidRowError:
    return InvalidRowError(f"{where} has no `{field}`; give each message a `role` and a `content`")


def _content(value: Any, where: str) -> str:
    if not isinstance(value, list):
        return require_str(value, where)
    texts = []
    for number, part in enumerate(value, start=1):
        found_type = part.get("type") if isinstance(part, dict) else None
        if isinstance(found_type, str) and found_type.removesuffix("_url") in _MEDIA_TYPES:
            raise InvalidRowError(f"{where}: part {number} is of the type {quote(found_type)}; {MEDIA_REMEDY}")
        if not isinstance(part, dict) or found_type != "text":
            found_type = (
                f"of the type {quote(found_type)}" if isinstance(found_type, str) else "not an object with a `type`"
            )
            raise InvalidRowError(
                f'{where}: part {number} is {found_type}; only parts of {{"type": "text", "text": ...}} are read'
            )
        name = next((name for name in _TEXT_PART_FIELDS if name in part), None)
        if name is None:
            raise InvalidRowError(f'{where}: part {number} has no `text`; write {{"type": "text", "text": ...}}')
        texts.append(require_str(part[name], f"{where}: part {number}: `{name}`"))
    return "".join(texts)


_MEDIA_TYPES = ("image", "video", "audio", "input_image", "input_audio")
MEDIA_REMEDY = "only text is trained; take out the rows with images, videos or sounds"
"""End of the messages about rows with more than text."""
_TEXT_PART_FIELDS = ("text", "value")
"""Fields of a part's text in OpenAI's and LLaMA-Factory's formats."""

_TRAIN_FLAG_ALIASES = ("loss_weight", "loss", "training")
"""Names of `train` in LLaMA-Factory, ms-swift and axolotl."""
_UNSUPPORTED_TRAIN_FLAGS = ("mask", "masked", "loss_mask", "loss_scale", "train_detail", "training_detail")
"""Fields by which other tools mask a message or a part of it."""


def _pop_train_flag(message: Message, where: str, default: bool | None) -> bool | None:
    """Remove all fields that decide whether the message is trained, and return the decision.

    `train` wins over `weight`, and `weight` over its aliases.
    """
    weight, train = message.pop("weight", None), message.pop("train", None)
    others = {name: _flag(message.pop(name), f"{where}: `{name}`") for name in _TRAIN_FLAG_ALIASES if name in message}
    unread = next((name for name in _UNSUPPORTED_TRAIN_FLAGS if name in message), None)
    if unread is not None:
        raise InvalidRowError(
            f"{where} has a `{unread}`, which is not read; write `train`: true or false, for a whole message"
        )
    if train is not None:
        if not isinstance(train, bool):
            raise InvalidRowError(f"{where}: `train` is {json_type_name(train)}; write true or false")
        return train
    if weight is None:
        if len(set(others.values())) > 1:
            raise InvalidRowError(f"{where}: {join_names(others)} contradict each other; keep one of them")
        return next(iter(others.values()), default)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise InvalidRowError(f"{where}: `weight` is {json_type_name(weight)}; write 0 or 1")
    if weight not in (0, 1):
        raise InvalidRowError(f"{where}: `weight` is neither 0 nor 1; write one of them")
    return bool(weight)


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool | int | float):
        raise InvalidRowError(f"{where} is {json_type_name(value)}; write true or false")
    if value not in (0, 1):
        raise InvalidRowError(
            f"{where} is neither 0 nor 1; write one of them, because a message is trained or it is not"
        )
    return bool(value)


def parse_tool_call(value: Any, where: str) -> dict[str, Any]:
    """Return the call with a `function` whose `arguments` are an object. OpenAI writes them as a string."""
    if not isinstance(value, dict):
        raise InvalidRowError(f"{where} is {json_type_name(value)}; write an object with `function`")
    parsed = {name: child for name, child in value.items() if child is not None}
    function = parsed.pop("function", None)
    if function is None:  # Some templates use {"name": ..., "arguments": ...} alone.
        function = {name: parsed.pop(name) for name in ("name", "arguments") if name in parsed}
    if not isinstance(function, dict):
        raise InvalidRowError(
            f"{where}: `function` is {json_type_name(function)}; write an object with `name` and `arguments`"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = decode_json_text(arguments, f"{where}: `arguments`")
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise InvalidRowError(
            f"{where}: `arguments` is {json_type_name(arguments)}; write an object, or one as JSON in a string"
        )
    function = function | {
        "name": require_nonempty_str(function.get("name"), f"{where}: `name`"),
        "arguments": arguments,
    }
    parsed = {"type": "function"} | parsed | {"function": function}
    check_json_value(parsed, where)
    return parsed


def parse_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return the functions that may be called, from a list of JSON schemas or its JSON text; None if it is empty."""
    if isinstance(value, str) and value.strip():
        value = decode_json_text(value, "`tools`")
    if not value and (value is None or isinstance(value, str | list)):
        return None
    if not isinstance(value, list):
        raise InvalidRowError(f"`tools` is {json_type_name(value)}; write a list of objects")
    for number, tool in enumerate(value, start=1):
        if not isinstance(tool, dict):
            raise InvalidRowError(f"`tools`: item {number} is {json_type_name(tool)}; write an object")
        check_json_value(tool, f"`tools`: item {number}")
    return value


def decode_json_field(value: Any, where: str) -> Any:
    """Return the list or object that a JSON text holds, as in CSV or Parquet; other values are returned unchanged."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith(("[", "{")):
        return decode_json_text(text, where)
    return None if text in ("", "null") else value


def decode_json_text(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise InvalidRowError(f"{where} is not valid JSON ({error}); correct it") from None
