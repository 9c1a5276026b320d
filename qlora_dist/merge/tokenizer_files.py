"""Copy of the tokenizer from an adapter's folder to the merged model."""

from __future__ import annotations

import shutil
from pathlib import Path

from qlora_dist.io.adapter_files import GENERATION_CONFIG_NAME

TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)
"""Patterns of the files that transformers saves for a tokenizer."""


def copy_tokenizer(adapter: Path, out: Path) -> bool:
    """Copy the tokenizer with its chat template, and the generation settings, from an adapter's folder.

    Returns:
        Whether the folder has a tokenizer. If so, the base's tokenizer files must not be copied.
    """
    if not (adapter / "tokenizer_config.json").is_file():
        return False
    for pattern in (*TOKENIZER_FILES, GENERATION_CONFIG_NAME):
        for path in adapter.glob(pattern):
            if path.is_file():
                shutil.copy2(path, out / path.name)
    return True
