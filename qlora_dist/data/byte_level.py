"""Byte-level tokenizers, whose tokens concatenate to the text's bytes, so that offsets follow from token lengths."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import models, pre_tokenizers

from qlora_dist.compat.transformers import has_stock_encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    """Return the components of a normalizer or pre-tokenizer, with sequences flattened."""
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
