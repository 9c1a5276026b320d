"""Encoder of texts: tokens, and the loss mask that follows from the spans of trained characters."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import models, pre_tokenizers

from qlora_dist.compat.transformers import has_stock_encoding
from qlora_dist.data.chat_renderer import CharSpan
from qlora_dist.data.loss_mask import loss_mask_from_spans

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EncodedSequence:
    """Tokens of a row, or of one answer."""

    tokens: npt.NDArray[np.int32]
    """int32[n]"""
    loss_mask: npt.NDArray[np.bool_]
    """bool[n]: whether each token is trained. The first flag has no effect, because nothing predicts the first token.
    """


class MaskedText(NamedTuple):
    """Text of a row with its trained spans."""

    text: str
    spans: list[CharSpan] | None
    """Spans of the trained characters, in ascending order; None means all characters."""
    spans_are_masked: bool = False
    """True if the spans are masked and all other characters are trained."""
    add_special_tokens: bool = False
    """True if the tokenizer adds its BOS and EOS tokens. Rendered conversations get them from the template instead."""


class TextEncoder:
    """Encoder of texts with a tokenizer.

    The tokens equal `tokenizer(texts, add_special_tokens=...)`, with one end-of-sequence token after texts with special
    tokens. A text that was rendered before may contain these tokens. No second BOS token precedes it then, and no
    second end-of-sequence token follows it, white space aside.

    A token is trained if it overlaps a span, by the offsets that the tokenizer returns. Offsets take a fifth of the
    tokenizer's time. For byte-level tokenizers they are computed from the tokens instead.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._byte_lengths = token_byte_lengths(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._stripping_tokens = frozenset(index for index, token in added if token.lstrip or token.rstrip)
        self._prefix_tokens, self._suffix_tokens = surrounding_special_tokens(tokenizer)

    @property
    def is_byte_level(self) -> bool:
        """Return whether tokens concatenate to the text's bytes, so that parts of a text can be tokenized alone."""
        return self._byte_lengths is not None

    def encode(self, texts: Sequence[MaskedText], *, add_special_tokens: bool) -> list[EncodedSequence]:
        """Encode texts that all have the same `add_special_tokens`."""
        if not texts:
            return []
        adds = (
            add_special_tokens
            and self._byte_lengths is not None
            and self._tokenizer.backend_tokenizer.num_special_tokens_to_add(False) > 0
        )
        if self._byte_lengths is None or (adds and any(text.spans is not None for text in texts)):
            return self._encode_by_offsets(texts, add_special_tokens=add_special_tokens)
        encoded = self._encode_by_bytes(texts, self._byte_lengths, add_special_tokens=add_special_tokens)
        by_bytes = [item for item in encoded if item is not None]
        if len(by_bytes) == len(encoded):
            return by_bytes
        fallback_texts = [text for text, item in zip(texts, encoded, strict=True) if item is None]
        fallback = iter(self._encode_by_offsets(fallback_texts, add_special_tokens=add_special_tokens))
        return [next(fallback) if item is None else item for item in encoded]

    def _encode_by_offsets(self, texts: Sequence[MaskedText], *, add_special_tokens: bool) -> list[EncodedSequence]:
        batch = self._tokenizer(
            [text.text for text in texts],
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids = batch["input_ids"]
        removed_prefix = self._normalize_bos_eos(ids, texts) if add_special_tokens else [0] * len(texts)
        encoded = []
        for index, (text, tokens) in enumerate(zip(texts, ids, strict=True)):
            loss_mask = np.ones(len(tokens), np.bool_)
            if text.spans is not None:
                in_spans = loss_mask_from_spans(batch.encodings[index], text.spans)
                if not self._stripping_tokens.isdisjoint(tokens):
                    self._exclude_stripped_space(in_spans, batch.encodings[index], text)
                in_spans = in_spans[removed_prefix[index] :][: len(tokens)]
                loss_mask[: len(in_spans)] = in_spans != text.spans_are_masked
                loss_mask[len(tokens) - 1 :] |= add_special_tokens and self._ends_with_eos(tokens)
            encoded.append(EncodedSequence(np.array(tokens, np.int32), loss_mask))
        return encoded

    def _exclude_stripped_space(self, inside: npt.NDArray[np.bool_], encoding: Encoding, text: MaskedText) -> None:
        """Use only the own text of tokens that absorb the white space beside them.

        Phi-3's `<|assistant|>` is such a token. If an answer began with white space, the model would learn to write
        this token.
        """
        for position, (token, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if token in self._stripping_tokens:
                token_text = text.text[start:end]
                first = start + len(token_text) - len(token_text.lstrip())
                last = start + len(token_text.rstrip())
                inside[position] = any(max(first, one) < min(last, other) for one, other in text.spans or ())

    def _encode_by_bytes(
        self, texts: Sequence[MaskedText], byte_lengths: npt.NDArray[np.int64], *, add_special_tokens: bool
    ) -> list[EncodedSequence | None]:
        """Encode texts of a byte-level tokenizer; None for a text that differs from its decoded tokens."""
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()  # The tokenizer's own call sets these each time.
        backend.no_padding()
        backend.encode_special_tokens = self._tokenizer.split_special_tokens
        encodings = backend.encode_batch_fast([text.text for text in texts], add_special_tokens=add_special_tokens)
        ids = [encoding.ids for encoding in encodings]
        counts = [len(tokens) for tokens in ids]
        if add_special_tokens:
            self._normalize_bos_eos(ids, texts)

        # All texts are concatenated, because numpy calls pay off for thousands of tokens, not for a hundred.
        bounds = np.cumsum([0, *map(len, ids)])
        tokens = np.fromiter(chain.from_iterable(ids), np.int32, bounds[-1])
        byte_offsets = np.zeros(len(tokens) + 1, np.int64)
        np.cumsum(byte_lengths[tokens], out=byte_offsets[1:])
        loss_mask = np.ones(len(tokens), np.bool_)
        rows = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        usable = [True] * len(texts)
        span_borders: list[int] = []
        span_flags: list[bool] = []
        for index, (text, (first, last)) in enumerate(zip(texts, rows, strict=True)):
            if text.spans is None:
                continue
            # In bytes, without the tokens that were appended.
            start, end = int(byte_offsets[first]), int(byte_offsets[first + counts[index]])
            usable[index] = end - start == _utf8_length(text.text) and unicodedata.is_normalized("NFC", text.text)
            if not usable[index]:
                continue
            loss_mask[first:last] = text.spans_are_masked
            loss_mask[last - 1 : last] |= add_special_tokens and self._ends_with_eos(ids[index])
            for span in text.spans:
                if span[0] < span[1]:  # No token overlaps an empty span.
                    span_borders += (
                        start + _utf8_length(text.text, span[0]),
                        start + _utf8_length(text.text, span[1]) - 1,
                    )
                    span_flags.append(not text.spans_are_masked)
        border_tokens = (byte_offsets.searchsorted(span_borders, side="right") - 1).tolist()
        for value, first, last in zip(span_flags, border_tokens[::2], border_tokens[1::2], strict=True):
            loss_mask[first : last + 1] = value
        return [
            EncodedSequence(tokens[first:last], loss_mask[first:last]) if use else None
            for (first, last), use in zip(rows, usable, strict=True)
        ]

    def _ends_with_eos(self, tokens: list[int]) -> bool:
        return bool(tokens) and tokens[-1] == self._tokenizer.eos_token_id

    def _normalize_bos_eos(self, ids: list[list[int]], texts: Sequence[MaskedText]) -> list[int]:
        """Remove a second BOS token, and give each text exactly one EOS token if the tokenizer has one.

        Returns:
            Number of tokens that were removed before each text.
        """
        eos, before = self._tokenizer.eos_token_id, self._prefix_tokens
        removed = [len(before) * (tokens[: 2 * len(before)] == before * 2) for tokens in ids]
        for tokens, text, prefix_length in zip(ids, texts, removed, strict=True):
            del tokens[:prefix_length]
            if eos is None:
                continue
            suffix_length = len(self._suffix_tokens) * (self._suffix_tokens == [eos] and tokens[-1:] == [eos])
            text_length = len(tokens) - suffix_length
            # The token is checked too, because a tokenizer may be set to split the texts of special tokens.
            if text.text.rstrip().endswith(str(self._tokenizer.eos_token)) and eos in tokens[:text_length]:
                del tokens[text_length:]
            elif not self._ends_with_eos(tokens):
                tokens.append(eos)
        return removed


def surrounding_special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer adds before and after every text."""
    with_special, without_special = (
        tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (True, False)
    )
    for start in range(len(with_special) - len(without_special) + 1):
        if without_special and with_special[start : start + len(without_special)] == without_special:
            return list(with_special[:start]), list(with_special[start + len(without_special) :])
    return [], []


def _utf8_length(text: str, end: int | None = None) -> int:
    if text.isascii():
        return len(text) if end is None else end
    return len(text[:end].encode())


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.int64] | None:
    """Return the number of bytes of each token, int64[vocabulary]; None if the tokenizer is not byte-level.

    Byte-level BPE is the tokenizer of GPT-2, Llama 3, Qwen and others. The normalizers and added tokens that are
    accepted here can only remove bytes from a text. A text in NFC that is as long as its tokens together has therefore
    lost none.
    """
    from transformers import PreTrainedTokenizerBase

    if not tokenizer.is_fast:
        return None
    tokenizer_class = type(tokenizer)
    if tokenizer_class.__call__ is not PreTrainedTokenizerBase.__call__:
        return None
    if not has_stock_encoding(tokenizer):
        return None  # Code Llama's tokenizer overrides it.
    backend = tokenizer.backend_tokenizer
    model = backend.model
    if (
        not isinstance(model, models.BPE)
        or model.dropout
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
    ):
        return None
    if not {part["type"] for part in _parts(backend.normalizer, "normalizers")} <= {"NFC"}:
        return None
    levels = [
        part for part in _parts(backend.pre_tokenizer, "pretokenizers") if part["type"] in ("ByteLevel", "Metaspace")
    ]
    if not levels or any(part["type"] == "Metaspace" or part["add_prefix_space"] for part in levels):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    lengths = np.zeros(max(backend.get_vocab(with_added_tokens=True).values()) + 1, np.int64)
    for text, index in vocabulary.items():
        lengths[index] = len(text)  # The vocabulary writes each byte as one character.
    for index, token in backend.get_added_tokens_decoder().items():
        lengths[index] = len(token.content.encode())
    unknown = backend.token_to_id(model.unk_token) if model.unk_token else None
    if unknown is not None and not all(letter in vocabulary for letter in pre_tokenizers.ByteLevel.alphabet()):
        lengths[unknown] = 2**40  # It may replace a byte, so a text that contains it must look too long.
    return lengths


def _parts(component: Any, children_key: str) -> list[dict[str, Any]]:
    if component is None:
        return []
    parts, flat = [json.loads(component.__getstate__())], []
    while parts:
        part = parts.pop()
        if part["type"] == "Sequence":
            parts += part[children_key]
        else:
            flat.append(part)
    return flat
