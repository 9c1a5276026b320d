"""Which rows a rank trains on at a step: a pure function of seed and step, so that resuming is arithmetic."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from qlora_dist.data.rows import EMPTY, Batch, Rows
from qlora_dist.errors import UserError


class Loader:
    """Endless training batches.

    The order is one stream of row indices, the permutations of epoch 0, 1, 2, ... one after another, each
    drawn from (seed, epoch); step s takes stream[s * global_batch : (s + 1) * global_batch]. Neither the
    world's size nor the micro-batch changes what a step trains on, and only the step needs to be saved.

    A step's rows are dealt out as [accumulation, rank, micro_batch]: the k-th micro-batches of all ranks are
    neighbours in the stream.
    """

    def __init__(
        self, rows: Rows, *, global_batch: int, micro_batch: int, rank: int, world_size: int, seed: int
    ) -> None:
        """Check that the batch can be dealt out.

        Args:
            rows: the data set, the same on every rank.
            global_batch: rows per step, over all ranks.
            micro_batch: rows per forward pass of one rank.
            rank: this rank.
            world_size: how many ranks there are.
            seed: of the order.

        Raises:
            UserError: global_batch is not a multiple of world_size * micro_batch.
        """
        assert 0 <= rank < world_size
        unit = world_size * micro_batch
        if global_batch % unit:
            below = global_batch // unit * unit
            nearest = f"{below} or {below + unit}" if below else f"{unit}"
            ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
            raise UserError(
                f"train.global_batch: {global_batch} is not a multiple of {unit} ({ranks} x "
                f"train.micro_batch: {micro_batch}); use {nearest}"
            )
        self.rows = rows
        self.gradient_accumulation = global_batch // unit
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank = rank
        self._world_size = world_size
        # numpy takes no negative seeds; two's complement keeps -1 and 1 apart
        self._seed = seed % 2**64
        self._cached: tuple[int, npt.NDArray[np.int64]] | None = None

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """The rows of a step over all ranks: int64[global_batch]. An end of epoch may repeat one."""
        position = np.arange(step * self._global_batch, (step + 1) * self._global_batch)
        epochs, places = np.divmod(position, len(self.rows))
        parts = [self._permutation(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def window(self, step: int) -> list[Batch]:
        """This rank's part of a step, `gradient_accumulation` batches."""
        dealt = self.indices(step).reshape(self.gradient_accumulation, self._world_size, self._micro_batch)
        return [self.rows.batch(micro) for micro in dealt[:, self._rank]]

    def tokens(self, step: int) -> int:
        """Tokens of a step over all ranks, padding not counted."""
        return int(self.rows.tokens[self.indices(step)].sum())

    def trained_tokens(self, step: int) -> int:
        """Labels of a step over all ranks that are not -100: what the summed loss is divided by."""
        return int(self.rows.trained_tokens[self.indices(step)].sum())

    def fingerprint(self) -> str:
        """sha256 of what decides on the batches: the rows' sizes, their order and the global batch."""
        digest = hashlib.sha256(f"{self._seed} {self._global_batch} {self.rows.seq_len}".encode())
        for counts in (self.rows.tokens, self.rows.trained_tokens, self.rows.sequences.tokens):
            digest.update(np.ascontiguousarray(counts).tobytes())
        return digest.hexdigest()

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._cached is None or self._cached[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._cached = epoch, generator.permutation(len(self.rows))
        return self._cached[1]


def eval_batches(rows: Rows, *, micro_batch: int, rank: int, world_size: int) -> list[Batch]:
    """This rank's part of the whole data set, in order, dealt out as [batch, rank, micro_batch].

    Every rank has the same number of batches, or the ranks' collectives would wait for each other forever;
    the last batches are completed with rows of padding, whose labels are all -100.
    """
    assert 0 <= rank < world_size
    unit = world_size * micro_batch
    batches = -(-len(rows) // unit)
    dealt = np.full(batches * unit, EMPTY, dtype=np.int64)
    dealt[: len(rows)] = np.arange(len(rows))
    return [rows.batch(micro) for micro in dealt.reshape(batches, world_size, micro_batch)[:, rank]]
