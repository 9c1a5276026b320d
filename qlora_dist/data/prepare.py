"""From the configuration's sources to packed rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from qlora_dist.config import DataConfig, SourceConfig
from qlora_dist.data.encode import Encoder
from qlora_dist.data.rows import Rows, build_rows
from qlora_dist.data.sequences import encode_rows
from qlora_dist.data.source import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prepared(NamedTuple):
    """The data of a run."""

    train: list[tuple[Rows, float]]
    """Each source's rows, and its weight."""
    eval: Rows | None
    """None: the configuration names no file for it."""


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, encode and pack the training and the held-out data.

    Raises:
        UserError: naming file, line and remedy.
    """
    train = [
        (_prepare(source, config, tokenizer), source.weight if isinstance(source, SourceConfig) else 1.0)
        for source in config.train
    ]
    return Prepared(train, None if config.eval is None else _prepare(config.eval, config, tokenizer))


def _prepare(source: str | SourceConfig, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Rows:
    path = source.path if isinstance(source, SourceConfig) else source
    sequences = encode_rows(read_rows([path], config.format), Encoder(tokenizer, config.mask))  # type: ignore[arg-type]
    return build_rows(sequences, config, _pad_id(tokenizer), path)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id that the embedding has: no label and no other sequence sees the padding."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)
