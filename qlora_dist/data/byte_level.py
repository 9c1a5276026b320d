"""Tokenizers whose tokens are the text's bytes, one behind the other: places follow from lengths."""

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
    """Bytes of each token's text: int64[vocabulary]; None for tokenizers of another kind.

    Byte-level BPE, as of GPT-2, Llama 3, Qwen and others. What is left of their normalizers and added tokens can only
    take bytes out of a text: a text that is in NFC already, and as long as its tokens together, has lost none.
    """
    from transformers import PreTrainedTokenizerBase

    if not tokenizer.is_fast:
        return None
    kind = type(tokenizer)
    if kind.__call__ is not PreTrainedTokenizerBase.__call__:
        return None
    if not has_stock_encoding(tokenizer):
        return None
    rules = tokenizer.backend_tokenizer
    model = rules.model
    if (
        not isinstance(model, models.BPE)
        or model.dropout
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
    ):
        return None
    if not {part["type"] for part in _parts(rules.normalizer, "normalizers")} <= {"NFC"}:
        return None
    levels = [
        part for part in _parts(rules.pre_tokenizer, "pretokenizers") if part["type"] in ("ByteLevel", "Metaspace")
    ]
    if not levels or any(part["type"] == "Metaspace" or part["add_prefix_space"] for part in levels):
        return None
    vocabulary = rules.get_vocab(with_added_tokens=False)
    lengths = np.zeros(max(rules.get_vocab(with_added_tokens=True).values()) + 1, np.int64)
    for text, index in vocabulary.items():
        lengths[index] = len(text)  # a letter for each byte
    for index, token in rules.get_added_tokens_decoder().items():
        lengths[index] = len(token.content.encode())
    unknown = rules.token_to_id(model.unk_token) if model.unk_token else None
    if unknown is not None and not all(letter in vocabulary for letter in pre_tokenizers.ByteLevel.alphabet()):
        lengths[unknown] = 2**40  # it may stand for a byte: a text that has it is to be found too long
    return lengths


def _parts(component: Any, children_key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer, taken apart."""
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
