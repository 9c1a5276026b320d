"""Tokenizer of a model from the metadata of its GGUF file."""

from __future__ import annotations

from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_dist.errors import UserError
from qlora_dist.io.gguf_file import GgufHeader

_TOKENIZER_REMEDY = (
    "put the file into a folder with tokenizer.json and tokenizer_config.json of the maker, and give that folder"
)
_GPT2_SPLITS = ("gpt-2", "default", "phi-2", "olmo")
"""Values of `tokenizer.ggml.pre` whose texts are split as GPT-2 does, which transformers does by default."""
_DIGIT_SPLITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""Values of which transformers knows none. Digits are split off first, so that spaces before a number stay
together."""


def save_gguf_tokenizer(path: Path, header: GgufHeader, folder: Path) -> None:
    """Save the tokenizer that transformers makes from a GGUF file.

    Raises:
        UserError: transformers cannot make it, or would split texts in another way than the model's maker.
    """
    metadata = header.metadata
    split = metadata.get("tokenizer.ggml.pre", "default")
    is_byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
    if is_byte_level and split not in (*_GPT2_SPLITS, *_DIGIT_SPLITS, *_known_splits()):
        raise UserError(f"{path}: its tokenizer splits texts as '{split}', which is not supported; {_TOKENIZER_REMEDY}")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            path.parent,
            gguf_file=path.name,
            clean_up_tokenization_spaces=False,  # would remove spaces before punctuation in code
            model_max_length=metadata[f"{metadata['general.architecture']}.context_length"],
        )
    except Exception as error:  # transformers' code may raise any kind for a vocabulary that it does not support
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path}: transformers cannot make a tokenizer from it ({reason}); {_TOKENIZER_REMEDY}"
        ) from None
    if is_byte_level and split in _DIGIT_SPLITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokenizer.save_pretrained(folder)


def _known_splits() -> tuple[str, ...]:
    """Return the values of `tokenizer.ggml.pre` that transformers knows. Older releases know none."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return ()
    return tuple(GGUF_PRE_TOKENIZER_SPLITS)
