"""All rows of a source as tokens, in flat arrays."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qlora_dist.data.encode import Encoder
from qlora_dist.data.source import Row


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences one after another: 5 bytes a token, no Python object for each."""

    flat_tokens: npt.NDArray[np.int32]
    """int32[tokens]"""
    flat_trained: npt.NDArray[np.bool_]
    """bool[tokens]: this token is a target. False for the first of each sequence, which nothing predicts."""
    offsets: npt.NDArray[np.int64]
    """int64[sequences + 1]: sequence i is flat_tokens[offsets[i]:offsets[i + 1]]."""

    @classmethod
    def of(cls, sequences: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Sequences:
        """Of (tokens, trained) each. Nothing predicts a first token: its flag is taken for False."""
        tokens, trained, offsets = array("i"), bytearray(), array("q", [0])
        for some, flags in sequences:
            tokens.extend(some)
            trained += bytes([0, *map(bool, flags[1:])][: len(flags)])
            offsets.append(len(tokens))
        return cls(
            # copies: they own their memory, where frombuffer alone would keep the growing buffers' slack
            np.frombuffer(tokens, dtype=np.int32).copy(),
            np.frombuffer(trained, dtype=np.bool_).copy(),
            np.frombuffer(offsets, dtype=np.int64).copy(),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64[sequences]."""
        return np.diff(self.offsets)

    @property
    def trained_lengths(self) -> npt.NDArray[np.int64]:
        """int64[sequences]: the targets of each; the first token is none."""
        return np.diff(np.concatenate([[0], np.cumsum(self.flat_trained)])[self.offsets])

    def tokens(self, index: int) -> npt.NDArray[np.int32]:
        """int32[length]."""
        return self.flat_tokens[self.offsets[index] : self.offsets[index + 1]]

    def trained(self, index: int) -> npt.NDArray[np.bool_]:
        """bool[length]."""
        return self.flat_trained[self.offsets[index] : self.offsets[index + 1]]


def encode_rows(rows: Iterable[Row], encoder: Encoder) -> Sequences:
    """Encode every row, whatever its length.

    Raises:
        UserError: a row's mistake (see `read_rows` and `Encoder`).
    """
    return Sequences.of((encoded.tokens, encoded.trained) for encoded in map(encoder, rows))
