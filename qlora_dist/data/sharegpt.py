"""ShareGPT's conversations, which have `from` and `value` instead of OpenAI's `role` and `content`."""

from __future__ import annotations

from typing import Any

from qlora_dist.data.messages import decode_json_field, decode_json_text, parse_message, parse_tool_call, parse_tools
from qlora_dist.data.source_row import Message, MessagesRow
from qlora_dist.data.validate import InvalidRowError, json_type_name, quote, require_str

_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}

_SPEAKERS = _ROLES.keys() - {"function_call"}


def parse_sharegpt_row(location: str, fields: dict[str, Any]) -> MessagesRow:
    items = decode_json_field(fields["conversations"], "`conversations`")
    if not isinstance(items, list):
        raise InvalidRowError(
            f"`conversations` is {json_type_name(items)}; write a list of objects with `from` and `value`"
        )
    if not items:
        raise InvalidRowError("`conversations` is empty; add a message or take the row out")
    messages = _with_call_ids([_message(item, f"message {number}") for number, item in enumerate(items, start=1)])
    return MessagesRow(
        location, prepend_system_message(messages, fields.get("system")), parse_tools(fields.get("tools"))
    )


def _with_call_ids(messages: list[Message]) -> list[Message]:
    """Set the ids of calls and their results, for which ShareGPT has no field and which some templates require.

    Mistral's template requires nine letters and digits.
    """
    number = 0
    open_calls: list[str] = []
    for message in messages:
        if message.get("tool_calls"):
            open_calls.clear()
        for call in message.get("tool_calls", ()):
            number += 1
            open_calls.append(call.setdefault("id", f"call{number:05d}"))
        if message["role"] == "tool" and open_calls and "tool_call_id" not in message:
            message["tool_call_id"] = open_calls.pop(0)
    return messages


def prepend_system_message(messages: list[Message], system: Any, train: bool | None = None) -> list[Message]:
    """Return the messages after a system message with this text and this `train`, if there is a text."""
    if system is None or not require_str(system, "`system`").strip():
        return messages
    if messages[0]["role"] != "system":
        flag = {} if train is None else {"train": train}
        return [{"role": "system", "content": system, **flag}, *messages]
    if messages[0].get("content") != system:
        raise InvalidRowError("the row has a `system`, and its first message is another; take one of them out")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise InvalidRowError(f"{where} is {json_type_name(item)}; write an object with `from` and `value`")
    if len(item) == 2 and type(item.get("from")) is str and "value" in item and item["from"] in _SPEAKERS:
        return parse_message({"role": _ROLES[item["from"]], "content": item["value"]}, where)
    names = ("role", "content") if "from" not in item and "role" in item else ("from", "value")
    for name in names:
        if name not in item and not item.get("tool_calls"):
            raise InvalidRowError(f"{where} has no `{name}`; give each message a `{names[0]}` and a `{names[1]}`")
    speaker, value = require_str(item.get(names[0]), f"{where}: `{names[0]}`"), item.get(names[1])
    if speaker not in _ROLES:
        raise InvalidRowError(f"{where} is from the unknown speaker {quote(speaker)}; write one of {', '.join(_ROLES)}")
    parsed = {name: child for name, child in item.items() if name not in names}
    parsed |= {"role": _ROLES[speaker], "content": value}
    if speaker == "function_call":
        calls = decode_json_text(value, f"{where}: the call") if isinstance(value, str) else value
        calls = calls if isinstance(calls, list) else [calls]
        parsed |= {"content": None, "tool_calls": [parse_tool_call(call, f"{where}: the call") for call in calls]}
    return parse_message(parsed, where)
