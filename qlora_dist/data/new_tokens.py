"""Tokens whose rows of embedding and head a run trains: added ones, and others that the configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_dist.config.schema import Config
from qlora_dist.data.tokenizer import add_tokens, load_tokenizer
from qlora_dist.errors import UserError

_MAX_LISTED_TOKENS = 8
"""Tokens that a line names at most."""


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """Rows of the vocabulary that a run adds or trains."""

    ids: tuple[int, ...] = ()
    """Token ids of the trained rows, in ascending order, with all rows that are added."""
    vocabulary: int
    """Rows of embedding and head, with the added ones."""
    remarks: tuple[str, ...] = ()
    """Lines to print."""


def find_new_tokens(config: Config, base: Path, embedding_rows: int) -> NewTokens:
    """Return the rows that `model.add_tokens` and `lora.trainable_tokens` add to a base's embedding, or train.

    `embedding_rows` is the number of rows in the folder `base`. A tokenizer's further tokens without a row get one too,
    if a row is added at all, as with transformers' `resize_token_embeddings(len(tokenizer))`.

    Raises:
        UserError: the folder has no tokenizer, or a token of `lora.trainable_tokens` does not exist.
    """
    tokens, trained = config.model.add_tokens, config.lora.trainable_tokens
    if not tokens and not trained:
        return NewTokens(vocabulary=embedding_rows)
    tokenizer = load_tokenizer(base)
    present = tokenizer.get_vocab()
    add_tokens(tokenizer, tokens)
    id_by_token = tokenizer.get_vocab()
    if unknown := [token for token in trained if token not in id_by_token]:
        raise UserError(
            f"lora.trainable_tokens: {unknown[0]} is no token of {base}; name it in model.add_tokens, which adds it"
        )
    new = [token for token in tokens if token not in present or present[token] >= embedding_rows]
    ids = {id_by_token[token] for token in (*new, *trained)}
    vocabulary = embedding_rows
    if any(token >= embedding_rows for token in ids):
        vocabulary = max(id_by_token.values()) + 1
    remarks = _remarks(new, [token for token in tokens if token not in new], id_by_token, embedding_rows, vocabulary)
    return NewTokens(
        ids=tuple(sorted(ids | {*range(embedding_rows, vocabulary)})), vocabulary=vocabulary, remarks=remarks
    )


def assume_new_tokens(config: Config, embedding_rows: int) -> NewTokens:
    """Return the rows for a base without tokenizer: each named token gets one that follows the embedding's."""
    count = len({*config.model.add_tokens, *config.lora.trainable_tokens})
    vocabulary = embedding_rows + count
    return NewTokens(ids=tuple(range(embedding_rows, vocabulary)), vocabulary=vocabulary)


def _remarks(
    new: Sequence[str], existing: Sequence[str], id_by_token: dict[str, int], rows: int, vocabulary: int
) -> tuple[str, ...]:
    remarks = []
    if existing:
        remarks.append(
            f"model.add_tokens: {_list(existing)}: in the tokenizer already, so no row is added; lora.trainable_tokens "
            "trains existing rows"
        )
    if spare := [token for token in new if id_by_token[token] < rows]:
        remarks.append(f"model.add_tokens: {_list(spare)}: trained in spare rows, of which the embedding has {rows:,}")
    if vocabulary > rows:
        remarks.append(
            f"model.add_tokens: embedding and head get {vocabulary - rows} rows after their {rows:,}, for tokens "
            "without one"
        )
    return tuple(remarks)


def _list(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - _MAX_LISTED_TOKENS} more" if len(tokens) > _MAX_LISTED_TOKENS else ""
    return ", ".join(tokens[:_MAX_LISTED_TOKENS]) + more
