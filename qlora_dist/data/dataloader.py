"""Data loader: the rows and batches that a rank trains on at each step, or evaluates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qlora_dist.data.collate import EMPTY_ROW, PADDING_ROW, Batch, PackedDataset
from qlora_dist.data.shuffle import epoch_of_position, length_grouped_order, rows_before, rows_in_epochs, shuffled_epoch
from qlora_dist.errors import UserError

_SAMPLED_STEPS = 64
"""Steps from which the fraction of padding is estimated."""


def gradient_accumulation(global_batch: int, micro_batch: int, world_size: int) -> int:
    unit = world_size * micro_batch
    if global_batch % unit:
        below = global_batch // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        raise UserError(
            f"train.global_batch: {global_batch} is not a multiple of {unit} ({ranks} x "
            f"train.micro_batch: {micro_batch}); use {nearest}"
        )
    return global_batch // unit


class BatchLayout(NamedTuple):
    """Sizes of a training batch, and the rank that loads its part."""

    global_batch: int
    """Rows per step, over all ranks."""
    micro_batch: int
    """Rows per forward pass of one rank."""
    rank: int
    world_size: int


class TrainDataLoader:
    """Batches of the training data, endless unless the number of epochs is given.

    The order is one stream of row indices (`shuffle.py`). Step s takes stream[s * global_batch : (s + 1) *
    global_batch], so the rows of a step depend neither on the world size nor on the micro-batch. Only the step must be
    saved to resume.

    The rows of a step are arranged as [accumulation, rank, micro_batch]. Without packing, they are sorted by length,
    longest first. The rows of a micro-batch then need little padding, and all ranks have about equal work at a time.
    """

    def __init__(
        self,
        sources: Sequence[tuple[PackedDataset, float]],
        layout: BatchLayout,
        *,
        seed: int,
        epochs: float | None = None,
        group_by_length: bool = False,
    ) -> None:
        """Take sources with their weights, equal on all ranks. Without `epochs`, which may be fractional, it is
        endless.

        `group_by_length` puts rows of similar length into a step.
        """
        assert 0 <= layout.rank < layout.world_size
        self.sources = tuple(sources)
        self.gradient_accumulation = gradient_accumulation(layout.global_batch, layout.micro_batch, layout.world_size)
        self._source_sizes = [(len(rows), weight) for rows, weight in sources]
        if self.rows_per_epoch < 1:
            raise UserError(
                f"data.train: the weights leave {self.rows_per_epoch:.2g} rows per epoch; raise one of them"
            )
        self._total_rows = None if epochs is None else rows_in_epochs(epochs, self._source_sizes)
        self.steps = None if self._total_rows is None else -(-self._total_rows // layout.global_batch)
        """Steps until the stream ends; None if it is endless."""
        self._source_offsets = np.cumsum([0, *(len(rows) for rows, _ in sources)])
        self._row_tokens, self._row_loss_tokens = (
            np.concatenate([getattr(rows, name) for rows, _ in sources]) for name in ("row_tokens", "row_loss_tokens")
        )
        self._is_packed = all(rows.is_packed for rows, _ in sources)
        self._group_by_length = group_by_length
        self._layout = layout
        self._seed = seed
        self._epoch_orders: dict[int, npt.NDArray[np.integer]] = {}

    @property
    def rows_per_epoch(self) -> float:
        """Return the rows of all sources, each multiplied by its weight."""
        return sum(count * weight for count, weight in self._source_sizes)

    def steps_to_epochs(self, steps: int) -> float:
        rows = steps * self._layout.global_batch
        return (rows if self._total_rows is None else min(rows, self._total_rows)) / self.rows_per_epoch

    def row_indices(self, step: int) -> npt.NDArray[np.integer]:
        """Return the rows of a step over all ranks, in the order in which they are dealt to ranks.

        Returns:
            int[global_batch], numbered through all sources. A row may occur twice where two epochs meet. If the stream
            ends within the step, its last rows are followed by `PADDING_ROW`.
        """
        position, end = step * self._layout.global_batch, (step + 1) * self._layout.global_batch
        last_position = end if self._total_rows is None else min(end, self._total_rows)
        parts = []
        while position < last_position:
            epoch = epoch_of_position(position, self._source_sizes)
            order, first = self._epoch_order(epoch), rows_before(epoch, self._source_sizes)
            parts.append(order[position - first : last_position - first])
            position += len(parts[-1])
        rows = np.concatenate(parts)
        if not self._is_packed:
            rows = rows[np.argsort(-self._row_tokens[rows], kind="stable")]
        return np.concatenate([rows, np.full(end - last_position, PADDING_ROW, dtype=rows.dtype)])

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this rank's `gradient_accumulation` micro-batches of a step, or fewer where the stream ends."""
        return [self._collate_indices(micro[self._layout.rank]) for micro in self._micro_batch_indices(step)]

    def tokens(self, step: int) -> int:
        """Return the tokens of a step over all ranks, without padding."""
        return int(self._row_tokens[self._nonpadding_indices(step)].sum())

    def loss_tokens(self, step: int) -> int:
        """Return the labels of a step over all ranks that are not -100. The summed loss is divided by this number."""
        return int(self._row_loss_tokens[self._nonpadding_indices(step)].sum())

    def padded_tokens(self, step: int) -> int:
        """Return the tokens of a step's batches over all ranks, with padding."""
        micros = self._micro_batch_indices(step).reshape(-1, self._layout.micro_batch)
        longest = np.where(micros == PADDING_ROW, 0, self._row_tokens[micros]).max(axis=1)
        return sum(map(self.sources[0][0].padded_length, longest.tolist())) * self._layout.micro_batch

    def padding_fraction(self, steps: int) -> float:
        """Return the fraction of padding in a run of `steps` steps, estimated from steps of its first epoch."""
        steps = min(steps, math.ceil(self.rows_per_epoch / self._layout.global_batch))
        sample = np.unique(np.linspace(0, steps - 1, _SAMPLED_STEPS).astype(np.int64)).tolist()
        return 1 - sum(map(self.tokens, sample)) / sum(map(self.padded_tokens, sample))

    def _nonpadding_indices(self, step: int) -> npt.NDArray[np.integer]:
        indices = self.row_indices(step)
        filled: npt.NDArray[np.bool_] = indices != PADDING_ROW
        return indices[filled]

    def _micro_batch_indices(self, step: int) -> npt.NDArray[np.integer]:
        """Return int[accumulation, rank, micro_batch]. All ranks omit micro-batches that are empty on every rank."""
        micro_batches = self.row_indices(step).reshape(-1, self._layout.world_size, self._layout.micro_batch)
        filled: npt.NDArray[np.bool_] = (micro_batches != PADDING_ROW).any(axis=(1, 2))
        return micro_batches[filled]

    def _collate_indices(self, indices: npt.NDArray[np.integer]) -> Batch:
        rows = []
        for index in indices.tolist():
            source = int(np.searchsorted(self._source_offsets, index, side="right")) - 1
            rows.append(
                EMPTY_ROW
                if index == PADDING_ROW
                else self.sources[source][0].read_row(index - int(self._source_offsets[source]))
            )
        return self.sources[0][0].collate(rows)

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.integer]:
        if epoch not in self._epoch_orders:
            order = shuffled_epoch(epoch, self._source_sizes, self._seed)
            if self._group_by_length:
                position = rows_before(epoch, self._source_sizes)
                order = length_grouped_order(
                    order, self._row_tokens, self._layout.global_batch, position, epoch, self._seed
                )
            # Two epochs are kept, because a step at the end of an epoch is read several times.
            self._epoch_orders = {e: o for e, o in self._epoch_orders.items() if e == epoch - 1} | {epoch: order}
        return self._epoch_orders[epoch]


def eval_batches(dataset: PackedDataset, *, micro_batch: int, rank: int, world_size: int) -> list[Batch]:
    """Return this rank's batches of the whole data set, arranged as [batch, rank, micro_batch].

    Rows are in order with packing, and longest first without. All ranks have the same number of batches, because
    otherwise collectives would hang. Rows of padding, whose labels are all -100, complete the last batches.
    """
    assert 0 <= rank < world_size
    unit = world_size * micro_batch
    batches = -(-len(dataset) // unit)
    row_indices = np.full(batches * unit, PADDING_ROW, dtype=np.int64)
    row_indices[: len(dataset)] = (
        np.arange(len(dataset)) if dataset.is_packed else np.argsort(-dataset.row_tokens, kind="stable")
    )
    return [dataset.batch(micro) for micro in row_indices.reshape(batches, world_size, micro_batch)[:, rank]]
