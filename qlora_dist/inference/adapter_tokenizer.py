"""The base's tokenizer with the tokens that adapters were trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_dist.adapters.saved_adapter import SavedAdapter
from qlora_dist.config.schema import Config
from qlora_dist.data.tokenizer import add_tokens, load_tokenizer
from qlora_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_adapter_tokenizer(config: Config, adapters: Sequence[SavedAdapter]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `model.base`, and add the tokens of the configuration and of the adapters' own tokenizers.

    Only the tokenizers of adapters that train rows of the vocabulary are read.

    Raises:
        UserError: a token would get another number than in an adapter's tokenizer.
    """
    tokenizer = load_tokenizer(Path(config.model.base), config.model.add_tokens)
    for adapter in adapters:
        if not (adapter.token_rows or adapter.full_tensors) or not (adapter.path / "tokenizer_config.json").is_file():
            continue
        added = load_tokenizer(adapter.path).added_tokens_decoder
        add_tokens(tokenizer, [str(token) for _, token in sorted(added.items())])
        for number, token in sorted(added.items()):
            if tokenizer.convert_tokens_to_ids(str(token)) != number:
                raise UserError(
                    f"{adapter.path}: its tokenizer has {token} as number {number}, which the tokenizer of "
                    f"{config.model.base}, or another adapter, gives to another token; merge it with its own base"
                )
    return tokenizer
