"""Conversations in OpenAI's form, checked and made what chat templates expect."""

from __future__ import annotations

from typing import Any

from qlora_dist.data.json_text import parse
from qlora_dist.data.records import Unusable, check_tree, filled, has_utf8, kind, quoted, string
from qlora_dist.data.row import Message


def conversation(value: Any, field: str, trained: bool | None = None) -> list[Message]:
    """The messages of a list.

    Args:
        value: the list.
        field: its name in the row.
        trained: the `train` of messages that have none.

    Raises:
        Unusable: naming the message by its number, from 1.
    """
    if not isinstance(value, list):
        raise Unusable(f"`{field}` is {kind(value)}; write a list of objects with `role` and `content`")
    if not value:
        raise Unusable(f"`{field}` is empty; add a message or take the row out")
    where = "message" if field == "messages" else f"`{field}`: message"
    return [message(item, f"{where} {number}", trained) for number, item in enumerate(value, start=1)]


def message(item: Any, where: str, trained: bool | None = None) -> Message:
    """One message: `content` is text, `tool_calls` hold objects, `train` is a boolean, and nothing is null.

    Raises:
        Unusable: it cannot be made so, or is an assistant's, to be trained, and says nothing.
    """
    if trained is None and _is_plain(item):
        return item
    if not isinstance(item, dict):
        raise Unusable(f"{where} is {kind(item)}; write an object with `role` and `content`")
    # Parquet gives every message all fields; a null is none, but templates ask `is defined`
    made = {name: value for name, value in item.items() if value is not None}
    if "role" not in item:
        raise _lacks("role", where)
    role = string(item["role"], f"{where}: `role`")
    calls = made.pop("tool_calls", None)
    if calls:
        made["tool_calls"] = _tool_calls(calls, where)
    trained = _trained(made, where, trained)
    if trained is not None:
        made["train"] = trained
    if "content" in made or not calls:
        if "content" not in item:
            raise _lacks("content", where)
        content = made["content"] = _content(item["content"], f"{where}: `content`")
        if role == "assistant" and not calls and trained is not False and not content.strip():
            raise Unusable(f"{where}: the assistant says nothing; give it `content`, or `train`: false")
    if made.keys() - _CHECKED:
        for name, value in made.items():
            string(name, f"{where}: a name")
            if name not in _CHECKED and isinstance(value, str | list | dict):
                check_tree(value, f"{where}: {quoted(name)}")
    return made


def _is_plain(item: Any) -> bool:
    """Whether it is a role and a content and nothing is wrong with it: nearly all are, and this is quick."""
    if type(item) is not dict or len(item) != 2:
        return False
    role, content = item.get("role"), item.get("content")
    if type(role) is not str or type(content) is not str or not has_utf8(role) or not has_utf8(content):
        return False
    return role != "assistant" or (content != "" and not content.isspace())


_CHECKED = {"role", "content", "tool_calls", "train"}


def _lacks(field: str, where: str) -> Unusable:
    return Unusable(f"{where} has no `{field}`; give each message a `role` and a `content`")


def _content(value: Any, where: str) -> str:
    if not isinstance(value, list):
        return string(value, where)
    texts = []
    for number, part in enumerate(value, start=1):
        if not isinstance(part, dict) or part.get("type") != "text":
            what = part.get("type") if isinstance(part, dict) else None
            what = f"of the type {quoted(what)}" if isinstance(what, str) else "no object with a `type`"
            raise Unusable(f'{where}: part {number} is {what}; only parts of {{"type": "text", "text": ...}} are read')
        texts.append(string(part.get("text"), f"{where}: part {number}: `text`"))
    return "".join(texts)


def _trained(made: Message, where: str, default: bool | None) -> bool | None:
    """Take `train` and `weight` out of the message; `train` wins."""
    weight, train = made.pop("weight", None), made.pop("train", None)
    if train is not None:
        if not isinstance(train, bool):
            raise Unusable(f"{where}: `train` is {kind(train)}; write true or false")
        return train
    if weight is None:
        return default
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise Unusable(f"{where}: `weight` is {kind(weight)}; write 0 or 1")
    if weight not in (0, 1):
        raise Unusable(f"{where}: `weight` is neither 0 nor 1; write one of them")
    return bool(weight)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Unusable(f"{where}: `tool_calls` is {kind(value)}; write a list of objects with `function`")
    return [tool_call(call, f"{where}: tool call {number}") for number, call in enumerate(value, start=1)]


def tool_call(value: Any, where: str) -> dict[str, Any]:
    """A call with its `function`, whose `arguments` are an object: OpenAI writes a string, templates write JSON anew.

    Raises:
        Unusable: it cannot be made so.
    """
    if not isinstance(value, dict):
        raise Unusable(f"{where} is {kind(value)}; write an object with `function`")
    made = {name: child for name, child in value.items() if child is not None}
    function = made.pop("function", None)
    if function is None:  # {"name": ..., "arguments": ...} alone, as some templates have it
        function = {name: made.pop(name) for name in ("name", "arguments") if name in made}
    if not isinstance(function, dict):
        raise Unusable(f"{where}: `function` is {kind(function)}; write an object with `name` and `arguments`")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = json_value(arguments, f"{where}: `arguments`")
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise Unusable(f"{where}: `arguments` is {kind(arguments)}; write an object, or one as JSON in a string")
    function = function | {
        "name": filled(function.get("name"), f"{where}: `name`"),
        "arguments": arguments,
    }
    made = {"type": "function"} | made | {"function": function}
    check_tree(made, where)
    return made


def tools(value: Any) -> list[dict[str, Any]] | None:
    """The functions that may be called: a list of JSON schemas, or one as JSON in a string; none where it is empty.

    Raises:
        Unusable: it is something else.
    """
    if isinstance(value, str) and value.strip():
        value = json_value(value, "`tools`")
    if not value and (value is None or isinstance(value, str | list)):
        return None
    if not isinstance(value, list):
        raise Unusable(f"`tools` is {kind(value)}; write a list of objects")
    for number, tool in enumerate(value, start=1):
        if not isinstance(tool, dict):
            raise Unusable(f"`tools`: item {number} is {kind(tool)}; write an object")
        check_tree(tool, f"`tools`: item {number}")
    return value


def json_value(text: str, where: str) -> Any:
    """What a string holds that is JSON.

    Raises:
        Unusable: it holds none.
    """
    try:
        return parse(text)
    except ValueError as error:
        raise Unusable(f"{where} is not valid JSON ({error}); correct it") from None
