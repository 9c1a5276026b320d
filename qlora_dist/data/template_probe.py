"""Probes of a chat template: small conversations show which roles and thoughts it writes."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from qlora_dist.compat.transformers import compile_chat_template
from qlora_dist.data.source_row import Message
from qlora_dist.data.validate import quote

CHAT_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment")
"""Roles of chat templates. A message with another role would never be trained."""

_ROLE_ALIASES = {
    **dict.fromkeys(("model", "bot", "gpt", "chatgpt", "ai"), "assistant"),
    **dict.fromkeys(("human", "prompter"), "user"),
}
"""Names of roles in other formats."""

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Fields of the assistant's reasoning in transformers."""

_MARK = "zqxjv"
"""Content that no template writes itself."""

_USER: Message = {"role": "user", "content": "a"}
_ANSWER: Message = {"role": "assistant", "content": "b"}
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {}}}
_CALLS: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}


class UnsupportedConversationError(Exception):
    """Conversation that cannot be encoded. The message names the problem and the remedy, without the location."""


class TemplateProbe:
    """Roles and thoughts that a template writes, each probed when a row first needs it.

    The results depend only on the template, so they are equal in all processes. `render` raises
    `UnsupportedConversationError` if the template refuses messages.
    """

    def __init__(self, template: str, render: Callable[[list[Message]], str]) -> None:
        self._template = template
        self._render = render
        self._rendered_roles = {"user", "assistant"}
        """Roles that are known and written."""
        self._compared_words: frozenset[str] | None = None
        self._renders_reasoning_cache: dict[bool, bool] = {}
        """Whether thoughts are written: of an answer, and of one that calls tools."""

    def check_roles(self, messages: list[Message]) -> None:
        if self._rendered_roles.issuperset([message["role"] for message in messages]):
            return
        for index, message in enumerate(messages):
            role = message["role"]
            if role in self._rendered_roles:
                continue
            known = role in CHAT_ROLES or (role not in _ROLE_ALIASES and role in self._words_in_comparisons())
            if not known and "train" not in message:
                raise UnsupportedConversationError(
                    f"message {index + 1} has the unknown role {quote(role)}; {_role_suggestion(role)}, or give the "
                    "message a `train` of true or false"
                )
            if self._renders_role(role):
                if known:
                    self._rendered_roles.add(role)
            elif self._is_not_rendered(messages, index, "content"):
                raise UnsupportedConversationError(
                    f"message {index + 1} has the role {quote(role)}, and the chat template writes nothing for it; "
                    "give it a role that the template writes, or use another template"
                )

    def check_reasoning(self, messages: list[Message], original_messages: list[Message]) -> None:
        """Check that the template writes the assistant's reasoning, at least in the last turn that has any.

        Many templates omit the reasoning of earlier turns, because a model does not see it at inference. `messages`
        have all names of the reasoning field, as the template gets them; `original_messages` have the names in the row.
        """
        for index in reversed(range(len(messages))):
            message = original_messages[index]
            field = next((name for name in _REASONING_FIELDS if message.get(name) and str(message[name]).strip()), None)
            if field is None or message["role"] != "assistant":
                continue
            if not self._renders_reasoning(bool(message.get("tool_calls"))) and self._is_not_rendered(
                messages[: index + 1], index, *_REASONING_FIELDS
            ):
                raise UnsupportedConversationError(
                    f"message {index + 1} has a `{field}`, which the chat template does not write; use a template that "
                    "does, write the thought into `content`, or take it out"
                )
            return

    def _renders_role(self, role: str) -> bool:
        probe_message: Message = {"role": role, "content": _MARK, "name": "f", "tool_call_id": _CALL["id"]}
        probes = [
            [probe_message, _USER],
            [_USER, _CALLS, probe_message],
            [_USER, probe_message],
            [probe_message, _USER, _ANSWER],
        ]
        return any(_MARK in self._render_or_empty(probe) for probe in probes)

    def _renders_reasoning(self, calls: bool) -> bool:
        if calls not in self._renders_reasoning_cache:
            answer = {**(_CALLS if calls else _ANSWER), **dict.fromkeys(_REASONING_FIELDS, _MARK)}
            self._renders_reasoning_cache[calls] = _MARK in self._render_or_empty([_USER, answer])
        return self._renders_reasoning_cache[calls]

    def _is_not_rendered(self, messages: list[Message], index: int, *fields: str) -> bool:
        message = messages[index]
        marked_fields = {name: f"{message[name]}{_MARK}" for name in fields if message.get(name)}
        if not marked_fields:
            return False
        changed = [*messages[:index], {**message, **marked_fields}, *messages[index + 1 :]]
        text = self._render_or_empty(messages)
        return text != "" and text == self._render_or_empty(changed)

    def _render_or_empty(self, messages: list[Message]) -> str:
        try:
            return self._render(messages)
        except UnsupportedConversationError:
            return ""

    def _words_in_comparisons(self) -> frozenset[str]:
        """Return the words with which the template compares values. They include roles of its own."""
        if self._compared_words is None:
            from jinja2 import nodes

            environment = compile_chat_template(self._template).environment
            compared = environment.parse(self._template).find_all(nodes.Compare)
            words = (const.value for node in compared for const in node.find_all(nodes.Const))
            self._compared_words = frozenset(word for word in words if isinstance(word, str))
        return self._compared_words


def _role_suggestion(role: str) -> str:
    near = _ROLE_ALIASES.get(role.lower()) or next(iter(difflib.get_close_matches(role.lower(), CHAT_ROLES, n=1)), None)
    return f"write {near}" if near else f"write one of {', '.join(CHAT_ROLES)}"
