"""One row -> its tokens, and which of them are trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from qlora_dist.data.row import CompletionRow, Message, MessagesRow, Row
from qlora_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mask = Literal["assistant", "all"]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row in tokens."""

    tokens: list[int]
    trained: list[bool]
    """As long as `tokens`. The first token is predicted from nothing: its flag has no effect."""


class Encoder:
    """A tokenizer, its chat template and the mask: `encoder(row)`.

    With mask `assistant` these tokens of a conversation are trained:

    - where the chat template has `{% generation %}` markers, what stands between them, taken at its word;
    - else, for every assistant turn, what the template writes after prompting for it: the content and the
      end-of-turn token. White space after that token (the line feed that ChatML writes after `<|im_end|>`) is
      not trained: generation has stopped by then. Where no special token ends the turn, white space is what
      ends it, and is trained. A token that straddles the answer's beginning is trained, as under markers.

    Rows of `text` train every token, and the end-of-sequence token that is put after them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask: Mask) -> None:
        self._tokenizer = tokenizer
        self._mask = mask
        # <|im_end|> is an added token, and not always a "special" one
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        self._special = tuple(text for text in added if text.strip())

    def __call__(self, row: Row) -> Encoded:
        """Encode one row.

        Raises:
            UserError: naming file, line and remedy: there is no chat template, it refuses the conversation,
                or what it writes for a turn depends on the turns after it.
        """
        if isinstance(row, MessagesRow):
            return self._conversation(row)
        text = row.prompt + row.completion if isinstance(row, CompletionRow) else row.text
        tokens = list(self._tokenizer(text, verbose=False)["input_ids"])
        eos = self._tokenizer.eos_token_id
        if eos is not None and tokens[-1:] != [eos]:  # some tokenizers put it there themselves
            tokens.append(eos)
        return Encoded(tokens, [True] * len(tokens))

    def _conversation(self, row: MessagesRow) -> Encoded:
        template = self._template(row)
        if self._mask == "all":
            tokens = list(self._tokenize(self._render(row, row.messages))["input_ids"])
            return Encoded(tokens, [True] * len(tokens))
        if not self._tokenizer.is_fast:
            raise UserError(
                f"{row.place}: this tokenizer does not tell where its tokens lie in the text, which "
                "data.mask: assistant needs; use a model folder with tokenizer.json, or data.mask: all"
            )
        if _GENERATION.search(template):
            return self._marked(row)
        text = self._render(row, row.messages)
        spans = self._answers(row, text)
        encoding = self._tokenize(text, return_offsets_mapping=True)
        return Encoded(
            list(encoding["input_ids"]), _inside([tuple(span) for span in encoding["offset_mapping"]], spans)
        )

    def _template(self, row: MessagesRow) -> str:
        try:
            return self._tokenizer.get_chat_template()
        except ValueError:  # none, or several of which none is the default
            raise UserError(
                f"{row.place}: the row has `messages`, and this tokenizer has no chat template; use rows "
                "with `text`, or a tokenizer with a chat template (an instruct model's)"
            ) from None

    def _marked(self, row: MessagesRow) -> Encoded:
        try:
            encoding = self._tokenizer.apply_chat_template(
                row.messages,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
        except TemplateError as error:
            raise _refused(row, error) from None
        return Encoded(list(encoding["input_ids"]), [bool(flag) for flag in encoding["assistant_masks"]])

    def _answers(self, row: MessagesRow, text: str) -> list[Span]:
        """Where the trained part of each assistant turn lies in `text`, by prefix difference.

        Prefixes are compared as text: token by token, an answer that starts with a line feed would be
        refused, because that line feed and the prompt's become one token.
        """
        spans = []
        for index, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                raise UserError(
                    f"{row.place}: the conversation starts with the assistant; put a user's message before it"
                )
            prompt = self._render(row, row.messages[:index], prompting=True)
            answered = self._render(row, row.messages[: index + 1])
            if not answered.startswith(prompt) or not text.startswith(answered):
                what = "an earlier turn" if answered.startswith(prompt) else "the prompt"
                raise UserError(
                    f"{row.place}: the chat template rewrites history ({what} of message {index + 1} changes "
                    "with what follows), so the mask of this row cannot be derived; use rows of one answer, "
                    "a chat template with {% generation %} markers, or data.mask: all"
                )
            stripped = answered.rstrip()
            end = len(stripped) if stripped.endswith(self._special) else len(answered)
            spans.append((len(prompt), max(end, len(prompt))))
        return spans

    def _render(self, row: MessagesRow, messages: list[Message], prompting: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompting)
        except TemplateError as error:
            raise _refused(row, error) from None

    def _tokenize(self, text: str, **options: bool) -> dict:
        # the template has written the beginning-of-sequence token already, if there is one
        return self._tokenizer(text, add_special_tokens=False, verbose=False, **options)


def _inside(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """For every token, whether it overlaps one of the spans; both are in ascending order."""
    flags = [False] * len(offsets)
    position = 0
    for start, end in spans:
        if start == end:  # an empty answer: the token that straddles it belongs to the prompt
            continue
        while position < len(offsets) and offsets[position][1] <= start:
            position += 1
        while position < len(offsets) and offsets[position][0] < end:
            flags[position] = True
            position += 1
    return flags


def _refused(row: MessagesRow, error: TemplateError) -> UserError:
    return UserError(f"{row.place}: the chat template refuses the conversation ({error}); change or take out the row")
