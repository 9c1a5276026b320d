"""Choice of the chat template: the tokenizer's, a shipped one, or one from a file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED_TEMPLATES = ("chatml", "alpaca", "guanaco")
"""Templates for base models, which have none. They have `{% generation %}` markers and lie in `templates/NAME.jinja`.
"""

_CHATML_END = "<|im_end|>"


def read_chat_template(chat_template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the Jinja text of `data.chat_template`."""
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
                f"data.chat_template: chatml: the tokenizer has no token {_CHATML_END}, which ends a turn; write "
                "alpaca or guanaco, or use a model whose tokenizer has that token"
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
