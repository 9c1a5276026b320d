"""Tokenizer of a model folder, and the choice of its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: Path, tokens: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's folder, and add the tokens of `model.add_tokens` to it."""
    from transformers import AutoTokenizer  # here, because the import takes seconds

    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a Hugging Face model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        add_tokens(tokenizer, tokens)
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # Files of another kind, or nested too deeply, raise anything.
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: holds no tokenizer ({reason}); copy it there from the original model") from None


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add the tokens that a tokenizer lacks, in this order. Each of them matches exactly its own characters.

    Raises:
        UserError: the tokenizer would not find one of the tokens in a text.
    """
    from transformers import AddedToken

    present = tokenizer.get_vocab()
    added = [token for token in tokens if token not in present]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    for token in added:
        if tokenizer.convert_tokens_to_ids(token) not in tokenizer(token, verbose=False)["input_ids"]:
            raise UserError(f"model.add_tokens: the tokenizer does not find {token!r} in a text; choose another token")


def choose_pad_token_id(tokenizer: PreTrainedTokenizerBase, largest_token_id: int) -> int:
    """Return a padding token that the embedding has. Any will do, because no label and no other sequence depends on it.

    The embedding must have `largest_token_id`, the highest id of the data, anyway. The tokenizer's padding token may
    lie beyond it, as the `[PAD]` that is added to Llama 2.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None and token <= largest_token_id), 0)


SHIPPED_TEMPLATES = ("chatml", "alpaca", "guanaco")
"""Templates for base models, which have none. They have `{% generation %}` markers and lie in `templates/NAME.jinja`.
"""

_CHATML_END = "<|im_end|>"


def read_chat_template(chat_template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if chat_template in SHIPPED_TEMPLATES:
        return _shipped(chat_template, tokenizer)
    path = Path(chat_template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"data.chat_template: {chat_template}: no such file; write {', '.join(SHIPPED_TEMPLATES)} or the path of a "
            "Jinja file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(
            f"data.chat_template: {chat_template}: cannot be read ({reason}); give the path of a Jinja file in UTF-8"
        ) from None


def _shipped(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if name == "chatml":
        if len(tokenizer(_CHATML_END, add_special_tokens=False, verbose=False)["input_ids"]) != 1:
            # Generation can stop at a single token only.
            raise UserError(
                f"data.chat_template: chatml: the tokenizer has no token {_CHATML_END}, which ends a turn; add it "
                "with model.add_tokens: [<|im_start|>, <|im_end|>], or write alpaca or guanaco"
            )
    elif tokenizer.eos_token is None:
        raise UserError(
            f"data.chat_template: {name}: the tokenizer has no end-of-sequence token, which ends an answer; write "
            "chatml, or give the tokenizer an eos_token"
        )
    text = (resources.files("qlora_dist.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    # Conversations get only the special tokens that the template writes, so it must write the tokenizer's BOS token.
    adds_bos = tokenizer("a", verbose=False)["input_ids"][0] == tokenizer.bos_token_id
    return "{{- bos_token }}" + text if adds_bos else text
