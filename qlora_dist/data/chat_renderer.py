"""A chat template, compiled once: messages -> text, by transformers' own rules at the cost of the rendering alone."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import TemplateSyntaxError

from qlora_dist.compat.transformers import assistant_span_renderer, compile_chat_template, reasoning_field_aliaser
from qlora_dist.data.source_row import Message
from qlora_dist.data.template_limit import TEMPLATE_LIMITER
from qlora_dist.data.template_probe import TemplateProbe, UnsupportedConversationError

CharSpan = tuple[int, int]
"""First character and the one after the last."""
_Alias = Callable[[list[Message]], list[Message]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatRenderer:
    """Writes conversations as `tokenizer.apply_chat_template` does.

    Raises:
        jinja2.TemplateSyntaxError: the template does not compile.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        self.source = template
        self.marked = _GENERATION.search(template) is not None
        """It says itself what the assistant generates."""
        try:
            self._template = compile_chat_template(template).environment.from_string(template)
        except RecursionError:
            raise TemplateSyntaxError("it is nested too deeply", 1) from None
        # jinja's ChainMap is walked through in Python for each rendering, which takes as long as a short conversation
        self._template.globals = dict(self._template.globals)
        self._render_marked: Callable[..., tuple[str, list[CharSpan]]] = assistant_span_renderer()
        self._alias_reasoning_fields: _Alias = reasoning_field_aliaser()
        self._special_tokens = dict(special_tokens)
        self._variables = {**self._template.globals, **special_tokens, "documents": None}
        self._mentions = {name: name in template for name in ("tools", "tool_calls", "function_call")}
        self._probe = TemplateProbe(template, lambda messages: self.text(messages, None))

    def given(self, variables: Mapping[str, Any] | None) -> ChatRenderer:
        """Return the template with a row's own variables, as `apply_chat_template(..., **variables)` has them."""
        if not variables:
            return self
        renderer = copy.copy(self)
        renderer._special_tokens = {**self._special_tokens, **variables}
        renderer._variables = {**self._variables, **variables}
        renderer._probe = self._probe.of(lambda messages: renderer.text(messages, None))
        return renderer

    def prepare_messages(self, messages: list[Message]) -> list[Message]:
        """The messages as the template is to see them; what `text` and `marks` take.

        Raises:
            Refused: there are tool calls, and the template does not write any, or their arguments are no object; or the
                template writes nothing for a message or for what the assistant thought; or nobody knows a role.
        """
        self._probe.check_roles(messages)
        if all(len(message) == 2 and message.get("content") is not None for message in messages):
            return messages  # a role and a content
        cleaned = []
        for message in messages:
            # null is no value (apply_chat_template drops it too), and `train` is not the template's business
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

    def text(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation, or with `add_generation_prompt` what the assistant gets to see before it answers.

        Raises:
            Refused: by the template.
        """
        try:
            inputs = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
            # what Template.render does, with the globals merged in beforehand
            context = self._template.new_context({**self._variables, **inputs}, shared=True)
            text = TEMPLATE_LIMITER.call("".join, self._template.root_render_func(context))
        except Exception as error:  # what a template does to values it did not expect is its own
            raise _refusal(error) from None
        return _require_utf8(text)

    def marks(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> tuple[str, list[CharSpan]]:
        """The conversation, and where in it the template marks what the assistant generates.

        Raises:
            Refused: by the template.
        """
        try:
            arguments = self._template, messages, tools, None, False
            text, spans = TEMPLATE_LIMITER.call(self._render_marked, *arguments, **self._special_tokens)
        except Exception as error:
            raise _refusal(error) from None
        return _require_utf8(text), spans

    def tools(self, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """The tools as the template is to see them.

        Raises:
            Refused: the template does not write any.
        """
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
            raise UnsupportedConversationError("`tool_calls` is no list of objects; write one object per call")
        return [_parse_call_arguments(call) for call in calls]


def _parse_call_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """The call with its arguments as an object: OpenAI writes them as a string, which templates would write quoted."""
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
            "the `arguments` of a tool call are no JSON object; write an object, or take the row out"
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
    except UnicodeEncodeError:  # a tokenizer would refuse the whole batch
        raise UnsupportedConversationError(
            "the conversation holds half of a surrogate pair; write the whole character"
        ) from None
    return text
