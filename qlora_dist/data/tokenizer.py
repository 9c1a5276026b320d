"""The model folder's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Read it; no weights are needed.

    Raises:
        UserError: there is no such folder, or no tokenizer in it.
    """
    from transformers import AutoTokenizer  # seconds

    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a Hugging Face model")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever its readers do to files that are of another kind, or nested without end
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: holds no tokenizer ({reason}); copy it there from the original model") from None


def choose_pad_token_id(tokenizer: PreTrainedTokenizerBase, largest_token_id: int) -> int:
    """Return an id that the embedding has: no label and no other sequence sees the padding.

    Args:
        tokenizer: its padding token is taken if possible; `[PAD]`, added to Llama 2, lies beyond the embedding.
        largest_token_id: the highest token number of the data, which the embedding must have anyway.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None and token <= largest_token_id), 0)
