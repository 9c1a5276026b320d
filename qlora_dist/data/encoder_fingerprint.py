"""Fingerprint of everything that the tokens and masks of an encoder depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODER_VERSION = 2
"""Version of the encoder. Raise it with every change of tokens or masks, so that caches are created again."""


def encoder_fingerprint(tokenizer: PreTrainedTokenizerBase, chat_template: Any, mask: str, multi_turn: str) -> str:
    """Return the SHA-256 in hex of the encoder's settings and of the tokenizer's vocabulary and rules."""
    digest = hashlib.sha256()
    settings = [
        ENCODER_VERSION,
        mask,
        multi_turn,
        chat_template,
        tokenizer.special_tokens_map,
        tokenizer.split_special_tokens,
    ]
    for part in (json.dumps(settings, sort_keys=True).encode(), *_tokenizer_parts(tokenizer)):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


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
