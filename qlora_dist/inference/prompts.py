"""Prompts, as what a model reads: a text as it is, or a conversation as the chat template writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from qlora_dist.data.chat_renderer import ChatRenderer
from qlora_dist.data.chat_template import SHIPPED_TEMPLATES, read_chat_template
from qlora_dist.data.data_files import data_file_type, read_data_file
from qlora_dist.data.inference_tokenizer import default_chat_template, end_of_turn_token_id
from qlora_dist.data.row_formats import parse_rows
from qlora_dist.data.source_row import BadRow, CompletionRow, Message, MessagesRow
from qlora_dist.data.template_probe import UnsupportedConversationError
from qlora_dist.data.text_encoder import surrounding_special_tokens
from qlora_dist.data.validate import RawRow
from qlora_dist.errors import UserError

_PLACEHOLDER_ANSWER = "answer"
_ANSWER_COLUMNS: dict[str, tuple[str, Any]] = {
    "prompt": ("completion", _PLACEHOLDER_ANSWER),
    "instruction": ("output", _PLACEHOLDER_ANSWER),
    "inputs": ("targets", _PLACEHOLDER_ANSWER),
}
"""What rows of the data formats have besides the question, and a row of prompts need not have."""


@dataclass(frozen=True)
class Prompt:
    """One question."""

    asked: str | list[Message]
    """A text to be continued, or a conversation to be answered."""
    adapter: str | None = None
    """Whose answer is wanted, if the row says so; `base`: none's."""
    place: str = "the prompt"
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that may be called."""
    variables: dict[str, Any] | None = None
    """Variables of the chat template: `chat_template_kwargs`."""


class PromptEncoder:
    """A tokenizer and a chat template, the same as in training.

    Args:
        tokenizer: of the base.
        chat_template: `data.chat_template`; None: the tokenizer's own.

    Raises:
        UserError: the template is missing or does not compile.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        template = _template(tokenizer, chat_template)
        try:
            self._renderer = None if template is None else ChatRenderer(template, tokenizer.special_tokens_map)
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template's line {error.lineno} does not compile ({error.message}); correct it or give "
                "another with --set data.chat_template=NAME"
            ) from None

    @property
    def has_template(self) -> bool:
        """Whether conversations can be written."""
        return self._renderer is not None

    def require_template(self, location: str) -> ChatRenderer:
        """The template.

        Raises:
            UserError: there is none.
        """
        if self._renderer is None:
            raise UserError(
                f"{location} is a conversation, and the tokenizer has no chat template; write --set data.chat_template= "
                f"with {', '.join(SHIPPED_TEMPLATES)} or the path of a Jinja file"
            )
        return self._renderer

    def tokens(self, prompt: Prompt) -> list[int]:
        """What the model reads.

        Raises:
            UserError: there is no chat template, or it refuses the conversation; or nothing is asked.
        """
        if isinstance(prompt.asked, str):
            ids = list(self.tokenizer(prompt.asked, verbose=False)["input_ids"])
            if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()  # of a tokenizer that ends each text
            bos_tokens = surrounding_special_tokens(self.tokenizer)[0]
            if (
                ids[: 2 * len(bos_tokens)] == bos_tokens * 2
            ):  # a prompt that was rendered before begins by itself, as in training
                del ids[: len(bos_tokens)]
        else:
            renderer = self.require_template(prompt.place).with_variables(prompt.variables)
            try:
                text = renderer.render(
                    renderer.prepare_messages(prompt.asked),
                    renderer.check_tools(prompt.tools),
                    add_generation_prompt=True,
                )
            except UnsupportedConversationError as refused:
                raise UserError(f"{prompt.place}: {refused}") from None
            ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not ids:
            raise UserError(f"{prompt.place}: is empty; write something to be continued")
        return ids

    def end_of_turn_token(self) -> int | None:
        """The token that the template writes behind an answer: what a model has learnt to stop with."""
        return None if self._renderer is None else end_of_turn_token_id(self.tokenizer, self._renderer)


def make_prompt(text: str, prompter: PromptEncoder, raw: bool = False, system: str | None = None) -> Prompt:
    """A user's turn where there is a chat template, unless it is to be continued as it is."""
    if raw or not prompter.has_template:
        return Prompt(text)
    return Prompt([*_system(system), {"role": "user", "content": text}])


def read_prompts(path: Path, prompter: PromptEncoder, raw: bool = False, system: str | None = None) -> list[Prompt]:
    """The prompts of a file: rows of the data formats, whose answers are left out and may be missing, or lines.

    Raises:
        UserError: naming file and line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of prompts; give JSONL, or lines of text")
    if data_file_type(path):
        prompts = list(_rows(path))
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); give lines of text in UTF-8") from None
        prompts = [make_prompt(line, prompter, raw, system) for line in lines if line.strip()]
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
            asked: str | list[Message] = _without_answer(row.messages)
            if not asked:
                raise UserError(f"{row.location}: the conversation holds no question; add one or take the row out")
        else:
            asked = row.prompt if isinstance(row, CompletionRow) else row.text
        of_conversation = (row.tools, row.template_variables) if isinstance(row, MessagesRow) else ()
        yield Prompt(asked, adapters.get(row.location), row.location, *of_conversation)


def _fill_missing_answer(fields: dict[str, Any]) -> dict[str, Any]:
    for question, (answer, value) in _ANSWER_COLUMNS.items():
        if question in fields and answer not in fields:
            is_conversation = isinstance(fields[question], list)
            return {**fields, answer: [{"role": "assistant", "content": value}] if is_conversation else value}
    return fields


def _without_answer(messages: Sequence[Message]) -> list[Message]:
    asked = list(messages)
    while asked and asked[-1]["role"] == "assistant":
        asked.pop()
    return asked


def _system(text: str | None) -> list[Message]:
    return [] if text is None else [{"role": "system", "content": text}]


def _template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str | None:
    if chat_template is not None:
        return read_chat_template(chat_template, tokenizer)
    return default_chat_template(tokenizer)
