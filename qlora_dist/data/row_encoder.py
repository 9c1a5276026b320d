"""Encoder of rows: tokens, and which of them are trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import TemplateSyntaxError

from qlora_dist.data.chat_renderer import ChatRenderer
from qlora_dist.data.loss_mask import MaskMode, trained_messages
from qlora_dist.data.per_answer import RenderedAnswer, render_answers
from qlora_dist.data.source_row import BadRow, CompletionRow, MessagesRow, SourceRow, TextRow
from qlora_dist.data.template_probe import UnsupportedConversationError
from qlora_dist.data.text_encoder import EncodedSequence, MaskedText, TextEncoder
from qlora_dist.data.tokenizer import SHIPPED_TEMPLATES, read_chat_template
from qlora_dist.data.turn_spans import RewrittenHistoryError, render_with_turn_spans
from qlora_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MultiTurnMode = Literal["auto", "whole", "per-answer"]

ENCODER_VERSION = 3
"""Version of the encoder. Raise it with every change of tokens or masks, so that caches are created again."""


class RowEncoder:
    """Encoder of rows with a tokenizer, a chat template and a mask.

    The mask `assistant` trains every assistant turn of a conversation, `last` trains the last of them, and `all` trains
    every token. A message's `train` overrides the mask. A turn is

    - for the assistant, if the template has `{% generation %}` markers, the text between them;
    - for the assistant otherwise, what the template writes after its prompt: content and end-of-turn token;
    - for other roles, content and end-of-turn token.

    White space after the end-of-turn token (ChatML's line feed after `<|im_end|>`) is not trained. If no special token
    ends the turn, white space ends it and is trained. A token across the beginning of a turn is trained.

    A completion is trained with the end-of-sequence token that is appended to it. A token across its beginning counts
    as completion. All tokens of a text are trained, and an end-of-sequence token is appended and trained too.

    A conversation becomes one sequence (`whole`), or one per trained answer (`per-answer`), which holds the answer and
    the prompt that inference would see. `auto` is `per-answer` for conversations whose history the template rewrites.

    Masks need a fast tokenizer. `chat_template` is `chatml`, `alpaca`, `guanaco` or the path of a Jinja file; None
    means the tokenizer's.
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
        # <|im_end|> is an added token, but not always a "special" one.
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        self._end_tokens = tuple(text for text in added if text.strip())
        self._template = None if chat_template is None else read_chat_template(chat_template, tokenizer)
        self._text_encoder = TextEncoder(tokenizer)
        self._renderers: dict[str, ChatRenderer] = {}
        if self._template is not None:
            self._compiled_renderer(self._template)

    @property
    def chat_template(self) -> Any:
        """Return the chat template: a text, a mapping of names to texts if the tokenizer has several, or None."""
        return self._tokenizer.chat_template if self._template is None else self._template

    def __reduce__(self) -> tuple[Any, ...]:
        # A compiled template cannot be pickled for worker processes.
        return RowEncoder, (self._tokenizer, self._mask, self._chat_template_name, self._multi_turn)

    def encode(self, rows: Sequence[SourceRow]) -> list[EncodedSequence | list[EncodedSequence] | BadRow]:
        """Encode rows, independently of each other and in order.

        Some hundred rows at a time are best, because they are tokenized together, on all cores unless
        TOKENIZERS_PARALLELISM is off.

        Returns:
            One item per row: its sequence, one sequence per answer, or a `BadRow` if it cannot be encoded.
        """
        results: list[EncodedSequence | list[EncodedSequence] | BadRow | None] = [None] * len(rows)
        texts: dict[bool, list[tuple[int, MaskedText]]] = {False: [], True: []}
        for index, row in enumerate(rows):
            text = self._render_row(row)
            if isinstance(text, BadRow):
                results[index] = text
            elif isinstance(text, list):
                results[index] = self._encode_answers(text)
            else:
                texts[text.add_special_tokens].append((index, text))
        for add_special_tokens, batch in texts.items():
            masked_texts = [text for _, text in batch]
            encoded = self._text_encoder.encode(masked_texts, add_special_tokens=add_special_tokens)
            for (index, _), sequence in zip(batch, encoded, strict=True):
                results[index] = sequence
        return [item for item in results if item is not None]

    def fingerprint(self) -> str:
        """Return the SHA-256 in hex of everything except the row that tokens and mask depend on.

        A date that a template writes is not included.
        """
        digest = hashlib.sha256()
        settings = [
            ENCODER_VERSION,
            self._mask,
            self._multi_turn,
            self.chat_template,
            self._tokenizer.special_tokens_map,
            self._tokenizer.split_special_tokens,
        ]
        for part in (json.dumps(settings, sort_keys=True).encode(), *_tokenizer_parts(self._tokenizer)):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    def _encode_answers(self, answers: list[RenderedAnswer]) -> list[EncodedSequence]:
        """Encode each answer after its prompt, which has exactly the same tokens as at inference."""
        wholes = self._text_encoder.encode([_text(answer) for answer in answers], add_special_tokens=False)
        prompts = self._text_encoder.encode(
            [MaskedText(answer.prompt, []) for answer in answers], add_special_tokens=False
        )
        encoded = []
        for answer, whole, prompt in zip(answers, wholes, prompts, strict=True):
            length = len(prompt.tokens)
            if np.array_equal(whole.tokens[:length], prompt.tokens) or not self._text_encoder.is_byte_level:
                encoded.append(whole)
                continue
            # A token (two line feeds) lies across the border. The model never sees it at inference.
            (rest,) = self._text_encoder.encode([MaskedText(answer.completion, answer.spans)], add_special_tokens=False)
            tokens = np.concatenate([prompt.tokens, rest.tokens])
            encoded.append(EncodedSequence(tokens, np.concatenate([prompt.loss_mask, rest.loss_mask])))
        return encoded

    def _render_row(self, row: SourceRow) -> MaskedText | list[RenderedAnswer] | BadRow:
        if isinstance(row, TextRow):
            return MaskedText(row.text, None, add_special_tokens=True)
        if isinstance(row, CompletionRow):
            text = row.prompt + row.completion
            if self._mask == "all":
                return MaskedText(text, None, add_special_tokens=True)
            self._require_offsets(row.location)
            return MaskedText(text, [(len(row.prompt), len(text))], add_special_tokens=True)
        try:
            return self._render_conversation(row)
        except UnsupportedConversationError as error:
            return BadRow(row.location, str(error))

    def _render_conversation(self, row: MessagesRow) -> MaskedText | list[RenderedAnswer]:
        renderer = self._compiled_renderer(self._template_for_row(row))
        renderer = renderer.with_variables(row.template_variables)
        messages, tools = renderer.prepare_messages(row.messages), renderer.check_tools(row.tools)
        trained = trained_messages(row.messages, self._mask)
        trains_all = self._mask == "all"
        if trains_all and all(trained):
            return MaskedText(renderer.render(messages, tools), None)
        self._require_offsets(row.location)
        indices = [index for index, flag in enumerate(trained) if flag != trains_all]
        if self._multi_turn != "per-answer" or trains_all or not indices:
            try:
                text, spans = render_with_turn_spans(renderer, messages, tools, indices, self._end_tokens)
                return MaskedText(text, spans, spans_are_masked=trains_all)
            except RewrittenHistoryError:
                if self._multi_turn == "whole" or trains_all:
                    raise
        return render_answers(renderer, messages, tools, indices, self._end_tokens)

    def _template_for_row(self, row: MessagesRow) -> str:
        if self._template is not None:
            return self._template
        try:
            template: str = self._tokenizer.get_chat_template(tools=row.tools or None)
        except (ValueError, NotImplementedError):  # There is none, or there are several without a default.
            named_templates = self._tokenizer.chat_template
            available = (
                f"only chat templates named {', '.join(named_templates)}, and no default"
                if named_templates
                else "no chat template"
            )
            raise UserError(
                f"{row.location}: the row is a conversation, and the tokenizer has {available}; write "
                f"data.chat_template: {', '.join(SHIPPED_TEMPLATES)} or the path of a Jinja file, or use an instruct "
                "model's tokenizer"
            ) from None
        return template

    def _compiled_renderer(self, template: str) -> ChatRenderer:
        if template not in self._renderers:
            try:
                self._renderers[template] = ChatRenderer(template, self._tokenizer.special_tokens_map)
            except TemplateSyntaxError as error:
                template_origin = self._chat_template_name or "none, so the tokenizer's is used"
                raise UserError(
                    f"data.chat_template: {template_origin}: line {error.lineno} does not compile ({error.message}); "
                    "correct it or give another"
                ) from None
        return self._renderers[template]

    def _require_offsets(self, location: str) -> None:
        if not self._tokenizer.is_fast:
            raise UserError(
                f"{location}: this tokenizer provides no token offsets, which data.mask: "
                f"{self._mask} needs for this row; use a model folder with tokenizer.json, or data.mask: all"
            )


def _text(answer: RenderedAnswer) -> MaskedText:
    start = len(answer.prompt)
    return MaskedText(
        answer.prompt + answer.completion, [(start + first, start + last) for first, last in answer.spans]
    )


def _tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> Iterator[bytes]:
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # Earlier calls of the tokenizer may have left these on. Every call sets them again.
        backend.no_padding()
        yield backend.to_str().encode()
        return
    yield type(tokenizer).__qualname__.encode()
    yield json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    yield repr(sorted(tokenizer.added_tokens_decoder.items())).encode()
    for name in sorted(tokenizer.vocab_files_names):
        path = getattr(tokenizer, name, None)
        if isinstance(path, str) and Path(path).is_file():
            yield Path(path).read_bytes()
