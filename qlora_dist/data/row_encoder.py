"""Rows -> their tokens, and which of them are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import TemplateSyntaxError

from qlora_dist.data.chat_renderer import ChatRenderer
from qlora_dist.data.chat_template import SHIPPED_TEMPLATES, read_chat_template
from qlora_dist.data.encoder_fingerprint import encoder_fingerprint
from qlora_dist.data.per_answer import RenderedAnswer, render_answers
from qlora_dist.data.source_row import BadRow, CompletionRow, Message, MessagesRow, SourceRow, TextRow
from qlora_dist.data.template_probe import UnsupportedConversationError
from qlora_dist.data.text_encoder import EncodedSequence, MaskedText, TextEncoder
from qlora_dist.data.turn_spans import RewrittenHistoryError, render_with_turn_spans
from qlora_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MaskMode = Literal["assistant", "last", "all"]
MultiTurnMode = Literal["auto", "whole", "per-answer"]


class RowEncoder:
    """A tokenizer, a chat template and the mask: `encode(rows)`.

    These tokens of a conversation are trained: with mask `assistant` every assistant turn, with `last` the last of
    them, with `all` every token; a message's `train` overrides that. A turn is

    - the assistant's, where the chat template has `{% generation %}` markers: what stands between them, at its word;
    - else the assistant's: what the template writes after prompting for it, content and end-of-turn token;
    - another's: its content and end-of-turn token.

    White space after the end-of-turn token (the line feed that ChatML writes after `<|im_end|>`) is not trained. Where
    no special token ends the turn, white space is what ends it, and is trained. A token that straddles the turn's
    beginning is trained.

    Of a prompt with a completion, the completion and the end-of-sequence token are trained, which is put after it; a
    token that straddles the border counts as completion. Of a text all tokens are trained, and that one.

    A conversation is one sequence (`whole`), or one for each trained answer (`per-answer`), which holds the prompt that
    inference would see and the answer. `auto` takes the second form where the template rewrites history.

    Args:
        tokenizer: of any kind; masks need a fast one.
        mask: what is trained of conversations and completions.
        chat_template: `chatml`, `alpaca`, `guanaco` or the path of a Jinja file; None: the tokenizer's.
        multi_turn: how a conversation becomes sequences.

    Raises:
        UserError: the template is missing, does not compile, or does not go with the tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask: MaskMode,
        chat_template: str | None = None,
        multi_turn: MultiTurnMode = "whole",
    ) -> None:
        self._tokenizer = tokenizer
        self._mask = mask
        self._multi_turn = multi_turn
        self._chat_template_name = chat_template
        # <|im_end|> is an added token, and not always a "special" one
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        self._end_tokens = tuple(text for text in added if text.strip())
        self._template = None if chat_template is None else read_chat_template(chat_template, tokenizer)
        self._text_encoder = TextEncoder(tokenizer)
        self._renderers: dict[str, ChatRenderer] = {}
        if self._template is not None:
            self._renderer(self._template)

    @property
    def template(self) -> Any:
        """Text of the chat template; a mapping of names to texts, of a tokenizer that has several; None."""
        return self._tokenizer.chat_template if self._template is None else self._template

    def __reduce__(self) -> tuple[Any, ...]:
        # for worker processes: a compiled template cannot be sent
        return RowEncoder, (self._tokenizer, self._mask, self._chat_template_name, self._multi_turn)

    def encode(self, rows: Sequence[SourceRow]) -> list[EncodedSequence | list[EncodedSequence] | BadRow]:
        """Encode rows, each independent of the others, in their order.

        They are tokenized together, on all cores unless TOKENIZERS_PARALLELISM is off: best some hundred at a time.

        Returns:
            For each row its tokens; a list of them, one for each answer; or why it cannot be used: the template refuses
            it, or its mask cannot be derived.

        Raises:
            UserError: no row of this kind can be encoded: there is no chat template, or the tokenizer does not tell
                where its tokens lie in the text, which the mask needs.
        """
        results: list[EncodedSequence | list[EncodedSequence] | BadRow | None] = [None] * len(rows)
        texts: dict[bool, list[tuple[int, MaskedText]]] = {False: [], True: []}
        for index, row in enumerate(rows):
            text = self._write(row)
            if isinstance(text, BadRow):
                results[index] = text
            elif isinstance(text, list):
                results[index] = self._encode_answers(text)
            else:
                texts[text.closed].append((index, text))
        for closed, batch in texts.items():
            for (index, _), encoded in zip(
                batch, self._text_encoder.encode([text for _, text in batch], closed), strict=True
            ):
                results[index] = encoded
        return [item for item in results if item is not None]

    def fingerprint(self) -> str:
        """SHA-256 in hex of what tokens and flags depend on besides the row (and the date, if a template writes it)."""
        template = self._tokenizer.chat_template if self._template is None else self._template
        return encoder_fingerprint(self._tokenizer, template, self._mask, self._multi_turn)

    def _encode_answers(self, answers: list[RenderedAnswer]) -> list[EncodedSequence]:
        """Encode each answer behind its prompt, of which the tokens are those that inference gives the model."""
        wholes = self._text_encoder.encode([_text(answer) for answer in answers], False)
        prompts = self._text_encoder.encode([MaskedText(answer.prompt, []) for answer in answers], False)
        encoded = []
        for answer, whole, prompt in zip(answers, wholes, prompts, strict=True):
            length = len(prompt.tokens)
            if np.array_equal(whole.tokens[:length], prompt.tokens) or not self._text_encoder.is_byte_level:
                encoded.append(whole)
                continue
            # a token straddles the border (two line feeds), which the model never sees when it is asked
            (rest,) = self._text_encoder.encode([MaskedText(answer.text, answer.spans)], False)
            tokens = np.concatenate([prompt.tokens, rest.tokens])
            encoded.append(EncodedSequence(tokens, np.concatenate([prompt.trained, rest.trained])))
        return encoded

    def _write(self, row: SourceRow) -> MaskedText | list[RenderedAnswer] | BadRow:
        if isinstance(row, TextRow):
            return MaskedText(row.text, None, closed=True)
        if isinstance(row, CompletionRow):
            text = row.prompt + row.completion
            if self._mask == "all":
                return MaskedText(text, None, closed=True)
            self._require_offsets(row.place)
            return MaskedText(text, [(len(row.prompt), len(text))], closed=True)
        try:
            return self._render_conversation(row)
        except UnsupportedConversationError as refused:
            return BadRow(row.place, str(refused))

    def _render_conversation(self, row: MessagesRow) -> MaskedText | list[RenderedAnswer]:
        renderer = self._renderer(self._template_for_row(row))
        renderer = renderer.given(row.variables)
        messages, tools = renderer.prepare_messages(row.messages), renderer.tools(row.tools)
        trained = self._trained(row.messages)
        trains_all = self._mask == "all"
        if trains_all and all(trained):
            return MaskedText(renderer.text(messages, tools), None)
        self._require_offsets(row.place)
        indices = [index for index, flag in enumerate(trained) if flag != trains_all]
        if self._multi_turn != "per-answer" or trains_all or not indices:
            try:
                text, spans = render_with_turn_spans(renderer, messages, tools, indices, self._end_tokens)
                return MaskedText(text, spans, spans_are_masked=trains_all)
            except RewrittenHistoryError:
                if self._multi_turn == "whole" or trains_all:
                    raise
        return render_answers(renderer, messages, tools, indices, self._end_tokens)

    def _trained(self, messages: list[Message]) -> list[bool]:
        """For every message, whether it is trained."""
        if self._mask == "all":
            flags = [True] * len(messages)
        else:
            flags = [message["role"] == "assistant" for message in messages]
            if self._mask == "last" and True in flags:
                last = len(flags) - 1 - flags[::-1].index(True)
                flags = [index == last for index in range(len(flags))]
        train_flags = [message.get("train") for message in messages]
        return [flag if train is None else train for flag, train in zip(flags, train_flags, strict=True)]

    def _template_for_row(self, row: MessagesRow) -> str:
        if self._template is not None:
            return self._template
        try:
            template: str = self._tokenizer.get_chat_template(tools=row.tools or None)
        except (ValueError, NotImplementedError):  # none, or several of which none is the default
            named_templates = self._tokenizer.chat_template
            available = (
                f"only chat templates named {', '.join(named_templates)}, and no default"
                if named_templates
                else "no chat template"
            )
            raise UserError(
                f"{row.place}: the row is a conversation, and the tokenizer has {available}; write "
                f"data.chat_template: {', '.join(SHIPPED_TEMPLATES)} or the path of a Jinja file, or use an instruct model's "
                "tokenizer"
            ) from None
        return template

    def _renderer(self, template: str) -> ChatRenderer:
        if template not in self._renderers:
            try:
                self._renderers[template] = ChatRenderer(template, self._tokenizer.special_tokens_map)
            except TemplateSyntaxError as error:
                template_origin = self._chat_template_name or "none, so the tokenizer's is used"
                raise UserError(
                    f"data.chat_template: {template_origin}: line {error.lineno} does not compile ({error.message}); correct it "
                    "or give another"
                ) from None
        return self._renderers[template]

    def _require_offsets(self, place: str) -> None:
        if not self._tokenizer.is_fast:
            raise UserError(
                f"{place}: this tokenizer does not tell where its tokens lie in the text, which data.mask: "
                f"{self._mask} needs for this row; use a model folder with tokenizer.json, or data.mask: all"
            )


def _text(answer: RenderedAnswer) -> MaskedText:
    start = len(answer.prompt)
    return MaskedText(answer.prompt + answer.text, [(start + first, start + last) for first, last in answer.spans])
