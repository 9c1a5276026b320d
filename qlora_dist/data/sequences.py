"""All rows of a data set as tokens, cut to length and counted, in flat arrays."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qlora_dist.data.encode import Encoder
from qlora_dist.data.row import BadRow, MessagesRow, TextRow
from qlora_dist.data.source import Row
from qlora_dist.data.source import TextRow as Document
from qlora_dist.errors import UserError


@dataclass(slots=True)
class Stats:
    """What became of a data set's rows."""

    rows: int = 0
    """Rows read."""
    untrained_rows: int = 0
    """Rows without a token to train within the length, dropped."""
    truncated_rows: int = 0
    """Rows cut to the length, of those kept."""
    tokens: int = 0
    """Tokens kept."""
    trained_tokens: int = 0
    """Tokens kept that are predicted and trained; never a sequence's first."""

    @property
    def sequences(self) -> int:
        """Rows kept."""
        return self.rows - self.untrained_rows


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences one after another: 5 bytes a token, no Python object for each."""

    tokens: npt.NDArray[np.int32]
    """int32[tokens]"""
    trained: npt.NDArray[np.bool_]
    """bool[tokens]: this token is a target. False for the first of each sequence, which nothing predicts."""
    offsets: npt.NDArray[np.int64]
    """int64[sequences + 1]: sequence i is tokens[offsets[i]:offsets[i + 1]]."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64[sequences]."""
        return np.diff(self.offsets)


def encode_rows(rows: Iterable[Row], encoder: Encoder, seq_len: int, name: str = "data") -> tuple[Sequences, Stats]:
    """Encode every row, cut it to `seq_len` tokens, drop those with nothing trained.

    Args:
        rows: from `read_rows`.
        encoder: turns one row into tokens.
        seq_len: the most tokens a sequence keeps.
        name: of the data set in a complaint, such as 'data.train'.

    Raises:
        UserError: a row's mistake (see `read_rows` and `Encoder`), or no row is left.
    """
    stats = Stats()
    tokens, trained, offsets = array("i"), bytearray(), array("q", [0])
    for row in rows:
        stats.rows += 1
        typed = TextRow(row.place, row.text) if isinstance(row, Document) else MessagesRow(row.place, row.messages)
        encoded = encoder.encode([typed])[0]
        if isinstance(encoded, BadRow):
            raise encoded.error()
        targets = bytearray(encoded.trained[:seq_len])
        targets[:1] = bytes(len(targets[:1]))  # the first token is predicted from nothing
        if not any(targets):
            stats.untrained_rows += 1
            continue
        stats.truncated_rows += len(encoded.tokens) > seq_len
        tokens.extend(encoded.tokens[:seq_len])
        trained += targets
        offsets.append(len(tokens))
    if len(offsets) == 1:
        raise UserError(
            f"{name}: none of the {stats.rows} rows has a token to train within data.seq_len: {seq_len}; "
            "raise it, or give rows with a non-empty `text` or with messages of the role 'assistant'"
        )
    sequences = Sequences(
        # copies: they own their memory, where frombuffer alone would keep the growing buffers' slack
        np.frombuffer(tokens, dtype=np.int32).copy(),
        np.frombuffer(trained, dtype=np.bool_).copy(),
        np.frombuffer(offsets, dtype=np.int64).copy(),
    )
    stats.tokens = len(sequences.tokens)
    stats.trained_tokens = int(sequences.trained.sum())
    return sequences, stats
