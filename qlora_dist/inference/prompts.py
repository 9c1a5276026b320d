"""Prompts and their tokens: a plain text, or a conversation that the chat template renders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from qlora_dist.data.chat_renderer import ChatRenderer
from qlora_dist.data.data_files import data_file_type, read_data_file
from qlora_dist.data.inference_tokenizer import default_chat_template, end_of_turn_token_id
from qlora_dist.data.row_formats import parse_rows
from qlora_dist.data.source_row import BadRow, CompletionRow, Message, MessagesRow
from qlora_dist.data.template_probe import UnsupportedConversationError
from qlora_dist.data.text_encoder import surrounding_special_tokens
from qlora_dist.data.tokenizer import SHIPPED_TEMPLATES, read_chat_template
from qlora_dist.data.validate import RawRow
from qlora_dist.errors import UserError

_ANSWER_COLUMNS = {"prompt": "completion", "instruction": "output", "inputs": "targets"}
"""Columns of answers by question, which rows of the data formats need and rows of prompts may lack."""
_PLACEHOLDER_ANSWER = "answer"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Text or conversation that a model continues."""

    content: str | list[Message]
    adapter: str | None = None
    """Name of the adapter that the row selects, if any; `base` selects the model without adapters."""
    place: str = "the prompt"
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that the model may call."""
    variables: dict[str, Any] | None = None
    """Variables of the chat template, from `chat_template_kwargs`."""


class PromptEncoder:
    """Encoder of prompts with the tokenizer and chat template of training.

    `chat_template` is the value of `data.chat_template`; None for the tokenizer's own template. A template that is
    missing or does not compile is a `UserError`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        if chat_template is None:
            template = default_chat_template(tokenizer)
        else:
            template = read_chat_template(chat_template, tokenizer)
        try:
            self._renderer = None if template is None else ChatRenderer(template, tokenizer.special_tokens_map)
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template's line {error.lineno} does not compile ({error.message}); correct it or give "
                "another with --set data.chat_template=NAME"
            ) from None

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template, which conversations need."""
        return self._renderer is not None

    def require_template(self, location: str) -> ChatRenderer:
        """Return the template. If there is none, it is a `UserError` about the location."""
        if self._renderer is None:
            raise UserError(
                f"{location} is a conversation, and the tokenizer has no chat template; write "
                f"--set data.chat_template= with {', '.join(SHIPPED_TEMPLATES)} or the path of a Jinja file"
            )
        return self._renderer

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt, which must not be empty."""
        if isinstance(prompt.content, str):
            ids = list(self.tokenizer(prompt.content, verbose=False)["input_ids"])
            if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()  # some tokenizers end each text
            bos_tokens = surrounding_special_tokens(self.tokenizer)[0]
            # a prompt that was rendered before has its own, as in training
            if ids[: 2 * len(bos_tokens)] == bos_tokens * 2:
                del ids[: len(bos_tokens)]
        else:
            renderer = self.require_template(prompt.place).with_variables(prompt.variables)
            try:
                text = renderer.render(
                    renderer.prepare_messages(prompt.content),
                    renderer.check_tools(prompt.tools),
                    add_generation_prompt=True,
                )
            except UnsupportedConversationError as error:
                raise UserError(f"{prompt.place}: {error}") from None
            ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not ids:
            raise UserError(f"{prompt.place}: is empty; write something to be continued")
        return ids

    def end_of_turn_token(self) -> int | None:
        """Return the token that the template writes after an answer, which the model has learned to stop with."""
        return None if self._renderer is None else end_of_turn_token_id(self.tokenizer, self._renderer)


def make_prompt(text: str, prompt_encoder: PromptEncoder, *, raw: bool = False, system: str | None = None) -> Prompt:
    """Return a user's turn if there is a chat template and `raw` is false, else a text to continue."""
    if raw or not prompt_encoder.has_template:
        return Prompt(content=text)
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return Prompt(content=[*messages, {"role": "user", "content": text}])


def read_prompts(
    path: Path, prompt_encoder: PromptEncoder, *, raw: bool = False, system: str | None = None
) -> list[Prompt]:
    """Read the prompts of a file: lines of text, or rows of the data formats, whose answers are dropped if present."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of prompts; give JSONL, or lines of text")
    if data_file_type(path):
        prompts = list(_rows(path))
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); give lines of text in UTF-8") from None
        prompts = [make_prompt(line, prompt_encoder, raw=raw, system=system) for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return prompts


def _rows(path: Path) -> Iterator[Prompt]:
    adapters: dict[str, str] = {}

    def completed() -> Iterator[RawRow | BadRow]:
        for record in read_data_file(path):
            if not isinstance(record, BadRow):
                place, fields = record
                if fields.get("adapter") is not None:
                    adapters[place] = str(fields["adapter"])
                record = place, _fill_missing_answer(fields)
            yield record

    for row in parse_rows(completed(), "auto", "the first row has it"):
        if isinstance(row, BadRow):
            raise row.to_error()
        if isinstance(row, MessagesRow):
            content: str | list[Message] = _without_answer(row.messages)
            if not content:
                raise UserError(f"{row.location}: the conversation holds no question; add one or take the row out")
        else:
            content = row.prompt if isinstance(row, CompletionRow) else row.text
        tools, variables = (row.tools, row.template_variables) if isinstance(row, MessagesRow) else (None, None)
        yield Prompt(
            content=content, adapter=adapters.get(row.location), place=row.location, tools=tools, variables=variables
        )


def _fill_missing_answer(fields: dict[str, Any]) -> dict[str, Any]:
    for question, answer in _ANSWER_COLUMNS.items():
        if question in fields and answer not in fields:
            turn = [{"role": "assistant", "content": _PLACEHOLDER_ANSWER}]
            return {**fields, answer: turn if isinstance(fields[question], list) else _PLACEHOLDER_ANSWER}
    return fields


def _without_answer(messages: Sequence[Message]) -> list[Message]:
    kept = list(messages)
    while kept and kept[-1]["role"] == "assistant":
        kept.pop()
    return kept
