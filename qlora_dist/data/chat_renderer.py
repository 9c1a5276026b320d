"""Compiled chat templates that render messages exactly as transformers does, without its overhead per call."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from jinja2 import TemplateSyntaxError

from qlora_dist.compat.transformers import assistant_span_renderer, compile_chat_template, reasoning_field_aliaser
from qlora_dist.data.source_row import Message
from qlora_dist.data.template_limit import TEMPLATE_LIMITER
from qlora_dist.data.template_probe import TemplateProbe, UnsupportedConversationError

CharSpan = tuple[int, int]
"""Index of the first character, and of the one after the last."""

_PROBE_TEXT = "zqxjv"
"""Content that no template writes itself."""
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatRenderer:
    """Compiled chat template that renders conversations as `tokenizer.apply_chat_template` does.

    Methods raise `UnsupportedConversationError` if the template refuses a conversation or omits a part of it.

    Raises:
        jinja2.TemplateSyntaxError: the template does not compile.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        self.source = template
        self.has_generation_blocks = _GENERATION_BLOCK.search(template) is not None
        """True if the template itself marks what the assistant generates."""
        try:
            self._template = compile_chat_template(template).environment.from_string(template)
        except RecursionError:
            raise TemplateSyntaxError("it is nested too deeply", 1) from None
        # A plain dict, because looking names up in jinja's ChainMap takes as long as rendering a short conversation.
        self._template.globals = dict(self._template.globals)
        self._render_marked: Callable[..., tuple[str, list[CharSpan]]] = assistant_span_renderer()
        self._alias_reasoning_fields: Callable[[list[Message]], list[Message]] = reasoning_field_aliaser()
        self._special_tokens = dict(special_tokens)
        self._variables = {**self._template.globals, **special_tokens, "documents": None}
        self._mentions = {name: name in template for name in ("tools", "tool_calls", "function_call")}
        self._probe = TemplateProbe(template, lambda messages: self.render(messages, None))

    def with_variables(self, variables: Mapping[str, Any] | None) -> ChatRenderer:
        """Return a renderer with additional variables, as `apply_chat_template(..., **variables)` takes them."""
        if not variables:
            return self
        renderer = copy.copy(self)
        renderer._special_tokens = {**self._special_tokens, **variables}
        renderer._variables = {**self._variables, **variables}
        renderer._probe = TemplateProbe(self.source, lambda messages: renderer.render(messages, None))
        return renderer

    def prepare_messages(self, messages: list[Message]) -> list[Message]:
        """Return the messages in the form that `render` and `render_with_assistant_spans` take."""
        self._probe.check_roles(messages)
        if all(len(message) == 2 and message.get("content") is not None for message in messages):
            return messages  # They hold only a role and a content.
        cleaned = []
        for message in messages:
            # apply_chat_template drops nulls too. The template has no use for `train`.
            message = {key: value for key, value in message.items() if value is not None and key != "train"}
            if "tool_calls" in message:
                message["tool_calls"] = self._prepare_tool_calls(message["tool_calls"])
            if "function_call" in message and not self._mentions["function_call"]:
                raise UnsupportedConversationError(
                    "the row has a `function_call`, which the chat template does not write; write it as `tool_calls`"
                )
            cleaned.append(message)
        aliased = self._alias_reasoning_fields(cleaned)
        self._probe.check_reasoning(aliased, cleaned)
        return aliased

    def render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, add_generation_prompt: bool = False
    ) -> str:
        """Return the text of the conversation, with the prompt for an answer if `add_generation_prompt` is set."""
        return self._render(self._with_parts(messages), tools, add_generation_prompt=add_generation_prompt)

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, add_generation_prompt: bool = False
    ) -> str:
        try:
            inputs = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
            # Template.render does the same, but merges the globals in each time.
            context = self._template.new_context({**self._variables, **inputs}, shared=True)
            text = TEMPLATE_LIMITER.call("".join, self._template.root_render_func(context))
        except Exception as error:  # A template can raise anything when it gets unexpected values.
            raise _refusal(error) from None
        return _require_utf8(text)

    def render_with_assistant_spans(
        self, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[CharSpan]]:
        """Return the text of the conversation, and the spans that the template marks as generated by the assistant."""
        try:
            arguments = self._template, self._with_parts(messages), tools, None, False
            text, spans = TEMPLATE_LIMITER.call(self._render_marked, *arguments, **self._special_tokens)
        except Exception as error:
            raise _refusal(error) from None
        return _require_utf8(text), spans

    def _with_parts(self, messages: list[Message]) -> list[Message]:
        """Return the messages with their texts as lists of parts, if the template writes them only then."""
        if not self._takes_parts:
            return messages
        return [
            {**message, "content": _text_part(message["content"])}
            if isinstance(message.get("content"), str)
            else message
            for message in messages
        ]

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template omits texts that are plain strings, as some of multimodal models do."""
        if "type" not in self.source:
            return False
        contents = _PROBE_TEXT, _text_part(_PROBE_TEXT)
        writes_string, writes_parts = (self._writes_probe(content) for content in contents)
        return writes_parts and not writes_string

    def _writes_probe(self, content: Any) -> bool:
        try:
            return _PROBE_TEXT in self._render([{"role": "user", "content": content}], None)
        except UnsupportedConversationError:
            return False

    def check_tools(self, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        if not tools:
            return None
        if not self._mentions["tools"]:
            raise UnsupportedConversationError(
                "the row has `tools`, which the chat template does not write; use one that does, or take them out"
            )
        return tools

    def _prepare_tool_calls(self, calls: Any) -> Any:
        if not calls:
            return calls
        if not self._mentions["tool_calls"]:
            raise UnsupportedConversationError(
                "the row has `tool_calls`, which the chat template does not write; use one that does, or take the row "
                "out"
            )
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise UnsupportedConversationError("`tool_calls` is not a list of objects; write one object per call")
        return [_parse_call_arguments(call) for call in calls]


def _text_part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _parse_call_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return the call with its arguments as an object. OpenAI writes a string, which templates would quote."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _parse_call_arguments(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise UnsupportedConversationError(
            "the `arguments` of a tool call are not a JSON object; write an object, or take the row out"
        )
    return {**call, "arguments": parsed}


def _refusal(error: Exception) -> UnsupportedConversationError:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return UnsupportedConversationError(
        f"the chat template refuses the conversation ({reason}); change or take out the row"
    )


def _require_utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # A tokenizer would refuse the whole batch.
        raise UnsupportedConversationError(
            "the conversation holds half of a surrogate pair; write the whole character"
        ) from None
    return text
