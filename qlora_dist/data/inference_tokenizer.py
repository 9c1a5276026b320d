"""Tokenizer, chat template and end tokens of training, as a served model needs them besides its weights."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError

from qlora_dist.data.chat_renderer import ChatRenderer
from qlora_dist.data.strict_json import load_json_object
from qlora_dist.data.template_probe import UnsupportedConversationError
from qlora_dist.data.tokenizer import read_chat_template
from qlora_dist.io.adapter_files import GENERATION_CONFIG_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE_ANSWER = "answer"


@dataclass(frozen=True)
class InferenceTokenizer:
    """Tokenizer with the chat template and the end tokens of training, ready to be saved."""

    tokenizer: PreTrainedTokenizerBase
    generation_config: dict[str, Any]
    """Content of generation_config.json with its end tokens; empty if neither the base model nor the template has any.
    """

    def save(self, out: Path) -> None:
        self.tokenizer.save_pretrained(out)
        if self.generation_config:
            (out / GENERATION_CONFIG_NAME).write_text(
                json.dumps(self.generation_config, indent=2) + "\n", encoding="utf-8"
            )


def make_inference_tokenizer(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, base: Path
) -> InferenceTokenizer:
    """Set the chat template and the end token of training on the base model's tokenizer, and return it.

    If `data.chat_template` ends turns with a token other than the end-of-sequence token, it becomes the end-of-sequence
    token, unless the template itself writes `eos_token`. The folder `base` may define further end tokens.
    """
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template, tokenizer)
    template = default_chat_template(tokenizer)
    end_token_id = None
    if template is not None:
        # If it does not compile, conversations are refused, and other rows need no template.
        with contextlib.suppress(TemplateSyntaxError):
            end_token_id = end_of_turn_token_id(tokenizer, ChatRenderer(template, tokenizer.special_tokens_map))
    if end_token_id is not None and chat_template is not None and "eos_token" not in (template or ""):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_token_id)
    generation = load_json_object(base / GENERATION_CONFIG_NAME)
    eos_token_ids = _as_token_ids(generation.get("eos_token_id")) or _config_eos_token_ids(
        load_json_object(base / "config.json")
    )
    if end_token_id is not None and end_token_id not in eos_token_ids:
        eos_token_ids = [end_token_id, *eos_token_ids]
    return InferenceTokenizer(tokenizer, generation | ({"eos_token_id": eos_token_ids} if eos_token_ids else {}))


def default_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the tokenizer's chat template for conversations without tools; None if it has none."""
    try:
        template: str = tokenizer.get_chat_template()
    except (ValueError, NotImplementedError):  # There is none, or there are several without a default.
        return None
    return template


def end_of_turn_token_id(tokenizer: PreTrainedTokenizerBase, renderer: ChatRenderer) -> int | None:
    """Return the token that the template writes after an answer; None if text or nothing ends the turn."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE_ANSWER}]
    try:
        after_answer = renderer.render(messages, None).rpartition(_PROBE_ANSWER)[2]
    except UnsupportedConversationError:
        return None
    ids = tokenizer(after_answer, add_special_tokens=False, verbose=False)["input_ids"]
    return int(ids[0]) if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _config_eos_token_ids(config: dict[str, Any]) -> list[int]:
    text = config.get("text_config")
    return _as_token_ids(config.get("eos_token_id")) or (
        _as_token_ids(text.get("eos_token_id")) if isinstance(text, dict) else []
    )


def _as_token_ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int)]
