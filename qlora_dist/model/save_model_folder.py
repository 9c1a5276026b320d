"""Completion of a model folder whose weights have been written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qlora_dist.io.safetensors_file import read_safetensors_header

_Key = TypeVar("_Key")

COPIED_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README*")
"""Names of the files that a model needs besides its weights; no weights, and no code."""


def split_into_files(sizes: Mapping[_Key, int], file_bytes: int) -> list[list[_Key]]:
    """Assign items to files of at most `file_bytes`, in order. A larger item gets its own file."""
    files: list[list[_Key]] = []
    size = 0
    for item, nbytes in sizes.items():
        if not files or size + nbytes > file_bytes:
            files.append([])
            size = 0
        files[-1].append(item)
        size += nbytes
    return files


def untie_head(config: dict[str, Any]) -> None:
    """Change a config.json so that the output head is a matrix of its own, in a multimodal model too."""
    config["tie_word_embeddings"] = False
    if isinstance(text := config.get("text_config"), Mapping):
        config["text_config"] = {**text, "tie_word_embeddings": False}


def set_vocab_size(config: dict[str, Any], size: int) -> None:
    """Change a config.json to the embedding's number of rows, which is a key of a multimodal model's `text_config`."""
    if isinstance(text := config.get("text_config"), Mapping):
        config["text_config"] = {**text, "vocab_size": size}
    if "vocab_size" in config or text is None:
        config["vocab_size"] = size


def finish_model_folder(
    partial: Path, out: Path, source: Path, config: Mapping[str, Any], replaced: Sequence[str] = ()
) -> None:
    """Add tokenizer, index and config.json to the weights in `partial`, and rename it to `out`.

    The weights are model-*.safetensors. Other files in `partial` are kept. Files of `source`, the folder from which the
    weights were made, are not copied if they match `replaced`.
    """
    for pattern in COPIED_PATTERNS:
        for path in source.glob(pattern):
            unwanted = path.name.endswith(".index.json") or any(path.match(name) for name in replaced)
            if not unwanted and not (partial / path.name).exists():
                shutil.copy2(path, partial / path.name)
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(partial.glob("model-*.safetensors")):
        for name, entry in read_safetensors_header(path).items():
            weight_map[name] = path.name
            total += entry.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    partial.rename(out)
