"""From the configuration's files to packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from qlora_dist.config import DataConfig
from qlora_dist.data.encode import Encoder
from qlora_dist.data.rows import Rows, pack_rows
from qlora_dist.data.sequences import Stats, encode_rows
from qlora_dist.data.source import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prepared(NamedTuple):
    """The data of a run."""

    train: Rows
    eval: Rows | None
    """None: the configuration names no file for it."""
    stats: dict[str, Stats]
    """Of 'train' and, if there is one, of 'eval'."""


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, encode and pack the training and the held-out data.

    Raises:
        UserError: naming file, line and remedy.
    """
    train, train_stats = _prepare("data.train", config.train, config, tokenizer)
    if config.eval is None:
        return Prepared(train, None, {"train": train_stats})
    held_out, eval_stats = _prepare("data.eval", [config.eval], config, tokenizer)
    return Prepared(train, held_out, {"train": train_stats, "eval": eval_stats})


def _prepare(
    name: str, paths: Sequence[str], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Rows, Stats]:
    encoder = Encoder(tokenizer, config.mask, config.chat_template)
    sequences, stats = encode_rows(read_rows(paths, config.format), encoder, config.seq_len, name)
    return pack_rows(sequences, config.seq_len, config.packing, _pad_id(tokenizer)), stats


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id that the embedding has: no label and no other sequence sees the padding."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)
