"""Tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, which needs no weights."""
    from transformers import AutoTokenizer  # here, because the import takes seconds

    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a Hugging Face model")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # Files of another kind, or nested too deeply, raise anything.
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: holds no tokenizer ({reason}); copy it there from the original model") from None


def choose_pad_token_id(tokenizer: PreTrainedTokenizerBase, largest_token_id: int) -> int:
    """Return a padding token that the embedding has. Any will do, because no label and no other sequence depends on it.

    The embedding must have `largest_token_id`, the highest id of the data, anyway. The tokenizer's padding token may
    lie beyond it, as the `[PAD]` that is added to Llama 2.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None and token <= largest_token_id), 0)
