"""The tokenizer of an adapter's folder, for the merged model."""

from __future__ import annotations

import shutil
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)
"""Patterns of what transformers saves of a tokenizer."""
_GENERATION = "generation_config.json"


def copy_tokenizer(adapter: Path, out: Path) -> bool:
    """Copy the tokenizer with its chat template, and the end tokens, from an adapter's folder if they are there.

    Returns:
        Whether there is a tokenizer: the base's files must not be mixed with it.
    """
    if not (adapter / "tokenizer_config.json").is_file():
        return False
    for pattern in (*TOKENIZER_FILES, _GENERATION):
        for path in adapter.glob(pattern):
            if path.is_file():
                shutil.copy2(path, out / path.name)
    return True
