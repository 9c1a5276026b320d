"""What an encoder's results depend on, as one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODER_VERSION = 2
"""Raise it with every change of the code that changes tokens or masks: what has been cached is then made anew."""


def encoder_fingerprint(tokenizer: PreTrainedTokenizerBase, chat_template: Any, mask: str, multi_turn: str) -> str:
    """SHA-256 in hex.

    Args:
        tokenizer: its vocabulary, rules and special tokens count; where it lies does not.
        chat_template: text of the chat template; a mapping of names to texts; None.
        mask: as in the configuration.
        multi_turn: as in the configuration.
    """
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
        rules = tokenizer.backend_tokenizer
        rules.no_truncation()  # whoever last called the tokenizer may have left these on; each call sets them anew
        rules.no_padding()
        yield rules.to_str().encode()
        return
    yield type(tokenizer).__qualname__.encode()
    yield json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    yield repr(sorted(tokenizer.added_tokens_decoder.items())).encode()
    for name in sorted(tokenizer.vocab_files_names):
        path = getattr(tokenizer, name, None)
        if isinstance(path, str) and Path(path).is_file():
            yield Path(path).read_bytes()
