"""Texts, and where in them the trained characters are -> tokens, and which of them are trained."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from qlora_dist.data.byte_level import token_byte_lengths
from qlora_dist.data.chat_renderer import CharSpan
from qlora_dist.data.label_mask import loss_mask_from_spans

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EncodedSequence:
    """A row in tokens."""

    tokens: npt.NDArray[np.int32]
    """int32[n]"""
    trained: npt.NDArray[np.bool_]
    """bool[n]. The first token is predicted from nothing: its flag has no effect."""


class MaskedText(NamedTuple):
    """What a row is written as."""

    text: str
    spans: list[CharSpan] | None
    """Where its trained characters are, in ascending order; None: everywhere."""
    spans_are_masked: bool = False
    """The spans are those that are not trained."""
    closed: bool = False
    """It begins and ends as the tokenizer's texts do, where a conversation has what the template writes."""


class TextEncoder:
    """A tokenizer: `encode(texts, closed)`.

    The tokens are those of `tokenizer(texts, add_special_tokens=closed)`, with the end-of-sequence token behind closed
    texts. A text that was rendered before has these tokens itself: nothing is put before a text that begins with it,
    and no end-of-sequence token behind one that ends with it, white space aside.

    A token is trained if it overlaps a span, by the offsets that the tokenizer gives. To keep track of these is a fifth
    of its work, and where tokens are the text's bytes they follow from the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._byte_lengths = token_byte_lengths(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._stripping_tokens = frozenset(index for index, token in added if token.lstrip or token.rstrip)
        self._prefix_tokens, self._behind = surrounding_special_tokens(tokenizer)

    @property
    def is_byte_level(self) -> bool:
        """Whether tokens are the text's bytes, so that parts of a text may be tokenized apart."""
        return self._byte_lengths is not None

    def encode(self, texts: Sequence[MaskedText], add_special_tokens: bool) -> list[EncodedSequence]:
        """Encode texts which are all closed, or all not."""
        if not texts:
            return []
        adds = (
            add_special_tokens
            and self._byte_lengths is not None
            and self._tokenizer.backend_tokenizer.num_special_tokens_to_add(False) > 0
        )
        if self._byte_lengths is None or (adds and any(text.spans is not None for text in texts)):
            return self._by_offsets(texts, add_special_tokens)
        encoded = self._encode_by_bytes(texts, add_special_tokens, self._byte_lengths)
        by_bytes = [item for item in encoded if item is not None]
        if len(by_bytes) == len(encoded):
            return by_bytes
        fallback_indices = [text for text, item in zip(texts, encoded, strict=True) if item is None]
        fallback = iter(self._by_offsets(fallback_indices, add_special_tokens))
        return [next(fallback) if item is None else item for item in encoded]

    def _by_offsets(self, texts: Sequence[MaskedText], closed: bool) -> list[EncodedSequence]:
        batch = self._tokenizer(
            [text.text for text in texts],
            add_special_tokens=closed,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids = batch["input_ids"]
        removed_prefix = self._close(ids, texts) if closed else [0] * len(texts)
        encoded = []
        for index, (text, tokens) in enumerate(zip(texts, ids, strict=True)):
            trained = np.ones(len(tokens), np.bool_)
            if text.spans is not None:
                in_spans = loss_mask_from_spans(batch.encodings[index], text.spans)
                if not self._stripping_tokens.isdisjoint(tokens):
                    self._exclude_stripped_space(in_spans, batch.encodings[index], text)
                in_spans = in_spans[removed_prefix[index] :][: len(tokens)]
                trained[: len(in_spans)] = in_spans != text.spans_are_masked
                trained[len(tokens) - 1 :] |= closed and self._ends_with_eos(tokens)
            encoded.append(EncodedSequence(np.array(tokens, np.int32), trained))
        return encoded

    def _exclude_stripped_space(self, inside: npt.NDArray[np.bool_], encoding: Encoding, text: MaskedText) -> None:
        """Count a token that takes the white space beside it where its own text stands.

        Phi-3's `<|assistant|>` is one: an answer that begins with white space would make the model learn to write it.
        """
        for place, (token, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if token in self._stripping_tokens:
                written = text.text[start:end]
                first = start + len(written) - len(written.lstrip())
                last = start + len(written.rstrip())
                inside[place] = any(max(first, one) < min(last, other) for one, other in text.spans or ())

    def _encode_by_bytes(
        self, texts: Sequence[MaskedText], closed: bool, byte_lengths: npt.NDArray[np.int64]
    ) -> list[EncodedSequence | None]:
        """None: the text is not what its tokens are written as."""
        rules = self._tokenizer.backend_tokenizer
        rules.no_truncation()  # what the tokenizer's own call sets each time
        rules.no_padding()
        rules.encode_special_tokens = self._tokenizer.split_special_tokens
        encodings = rules.encode_batch_fast([text.text for text in texts], add_special_tokens=closed)
        ids = [encoding.ids for encoding in encodings]
        counts = [len(tokens) for tokens in ids]
        if closed:
            self._close(ids, texts)

        # all texts one behind the other: numpy's calls are worth it for thousands of tokens, not for a hundred
        bounds = np.cumsum([0, *map(len, ids)])
        tokens = np.fromiter(chain.from_iterable(ids), np.int32, bounds[-1])
        byte_offsets = np.zeros(len(tokens) + 1, np.int64)
        np.cumsum(byte_lengths[tokens], out=byte_offsets[1:])
        trained = np.ones(len(tokens), np.bool_)
        rows = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        usable = [True] * len(texts)
        span_borders: list[int] = []
        span_flags: list[bool] = []
        for index, (text, (first, last)) in enumerate(zip(texts, rows, strict=True)):
            if text.spans is None:
                continue
            start, end = (
                int(byte_offsets[first]),
                int(byte_offsets[first + counts[index]]),
            )  # in bytes, without what was put behind it
            usable[index] = end - start == _utf8_length(text.text) and unicodedata.is_normalized("NFC", text.text)
            if not usable[index]:
                continue
            trained[first:last] = text.spans_are_masked
            trained[last - 1 : last] |= closed and self._ends_with_eos(ids[index])
            for span in text.spans:
                if span[0] < span[1]:  # a token that straddles an empty span is not in it
                    span_borders += (
                        start + _utf8_length(text.text, span[0]),
                        start + _utf8_length(text.text, span[1]) - 1,
                    )
                    span_flags.append(not text.spans_are_masked)
        border_tokens = (byte_offsets.searchsorted(span_borders, side="right") - 1).tolist()
        for value, first, last in zip(span_flags, border_tokens[::2], border_tokens[1::2], strict=True):
            trained[first : last + 1] = value
        return [
            EncodedSequence(tokens[first:last], trained[first:last]) if use else None
            for (first, last), use in zip(rows, usable, strict=True)
        ]

    def _ends_with_eos(self, tokens: list[int]) -> bool:
        return bool(tokens) and tokens[-1] == self._tokenizer.eos_token_id

    def _close(self, ids: list[list[int]], texts: Sequence[MaskedText]) -> list[int]:
        """Give each text one beginning and one end, whether they come from the text, the tokenizer or neither.

        Returns:
            For each text the number of tokens that were removed in front of it.
        """
        eos, before = self._tokenizer.eos_token_id, self._prefix_tokens
        removed = [len(before) * (tokens[: 2 * len(before)] == before * 2) for tokens in ids]
        for tokens, text, prefix_length in zip(ids, texts, removed, strict=True):
            del tokens[:prefix_length]
            if eos is None:
                continue
            suffix_length = len(self._behind) * (self._behind == [eos] and tokens[-1:] == [eos])
            text_length = len(tokens) - suffix_length
            # the token is looked for as well, because a tokenizer may be set to split the texts of special tokens
            if text.text.rstrip().endswith(str(self._tokenizer.eos_token)) and eos in tokens[:text_length]:
                del tokens[text_length:]
            elif not self._ends_with_eos(tokens):
                tokens.append(eos)
        return removed


def surrounding_special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer puts before and behind every text."""
    with_special, without_special = (
        tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (True, False)
    )
    for start in range(len(with_special) - len(without_special) + 1):
        if without_special and with_special[start : start + len(without_special)] == without_special:
            return list(with_special[:start]), list(with_special[start + len(without_special) :])
    return [], []


def _utf8_length(text: str, end: int | None = None) -> int:
    """Bytes of the text up to a character."""
    if text.isascii():
        return len(text) if end is None else end
    return len(text[:end].encode())
