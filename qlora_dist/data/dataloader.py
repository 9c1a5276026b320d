"""The batches of a rank: which rows it trains on at a step, and on which it evaluates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qlora_dist.data.collate import EMPTY_ROW, PADDING_ROW, Batch, PackedDataset
from qlora_dist.data.shuffle import epoch_of_position, length_grouped_order, rows_before, rows_in_epochs, shuffled_epoch
from qlora_dist.errors import UserError

_SAMPLED_STEPS = 64


def gradient_accumulation(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro-batches of a rank to an optimizer step.

    Raises:
        UserError: global_batch is not a multiple of world_size * micro_batch.
    """
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


class TrainDataLoader:
    """Training batches, endless unless the number of epochs is given.

    The order is one stream of row numbers (`order.py`); step s takes stream[s * global_batch : (s + 1) * global_batch].
    Neither the world's size nor the micro-batch changes what a step trains on, and only the step needs to be saved.

    A step's rows are dealt out as [accumulation, rank, micro_batch]. Without packing the longest come first, so those
    of a micro-batch are padded little, and ranks that wait for each other have about the same to do.
    """

    def __init__(
        self,
        sources: Sequence[tuple[PackedDataset, float]],
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        epochs: float | None = None,
        group_by_length: bool = False,
    ) -> None:
        """Check that the batch can be dealt out.

        Args:
            sources: the rows of each and its weight, the same on every rank.
            global_batch: rows per step, over all ranks.
            micro_batch: rows per forward pass of one rank.
            rank: this rank.
            world_size: how many ranks there are.
            seed: of the order.
            epochs: where the stream ends, in the middle of an epoch if it is no whole number; None: nowhere.
            group_by_length: put rows of similar length into a step.

        Raises:
            UserError: global_batch is not a multiple of world_size * micro_batch, or the weights are too small.
        """
        assert 0 <= rank < world_size
        self.sources = tuple(sources)
        self.gradient_accumulation = gradient_accumulation(global_batch, micro_batch, world_size)
        self._source_sizes = [(len(rows), weight) for rows, weight in sources]
        if self.rows_per_epoch < 1:
            raise UserError(
                f"data.train: the weights leave {self.rows_per_epoch:.2g} rows to an epoch; raise one of them"
            )
        self._end = None if epochs is None else rows_in_epochs(epochs, self._source_sizes)
        self.steps = None if self._end is None else -(-self._end // global_batch)
        """None: endless."""
        self._source_offsets = np.cumsum([0, *(len(rows) for rows, _ in sources)])
        self._tokens, self._row_loss_tokens = (
            np.concatenate([getattr(rows, name) for rows, _ in sources]) for name in ("tokens", "trained_tokens")
        )
        self._is_packed = all(rows.packed for rows, _ in sources)
        self._group_by_length = group_by_length
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._epoch_orders: dict[int, npt.NDArray[np.integer]] = {}

    @property
    def rows_per_epoch(self) -> float:
        """Of all sources, with their weights."""
        return sum(count * weight for count, weight in self._source_sizes)

    def steps_to_epochs(self, steps: int) -> float:
        """How often so many steps pass over the data."""
        rows = steps * self._global_batch
        return (rows if self._end is None else min(rows, self._end)) / self.rows_per_epoch

    def indices(self, step: int) -> npt.NDArray[np.integer]:
        """The rows of a step over all ranks, as they are dealt out.

        Returns:
            int[global_batch], numbered through all sources. An end of an epoch may repeat one. Where the stream ends
            within a step, `PADDING_ROW` behind its last rows.
        """
        begin, end = step * self._global_batch, (step + 1) * self._global_batch
        last_position = end if self._end is None else min(end, self._end)
        parts = []
        position = begin
        while position < last_position:
            epoch = epoch_of_position(position, self._source_sizes)
            order, first = self._epoch_order(epoch), rows_before(epoch, self._source_sizes)
            parts.append(order[position - first : last_position - first])
            position += len(parts[-1])
        rows = np.concatenate(parts)
        if not self._is_packed:
            rows = rows[np.argsort(-self._tokens[rows], kind="stable")]
        return np.concatenate([rows, np.full(end - last_position, PADDING_ROW, dtype=rows.dtype)])

    def window(self, step: int) -> list[Batch]:
        """This rank's part of a step: `gradient_accumulation` batches, or fewer where the stream ends."""
        return [self._collate_indices(micro[self._rank]) for micro in self._micro_batch_indices(step)]

    def tokens(self, step: int) -> int:
        """Tokens of a step over all ranks, padding not counted."""
        return int(self._tokens[self._nonpadding_indices(step)].sum())

    def trained_tokens(self, step: int) -> int:
        """Labels of a step over all ranks that are not -100: what the summed loss is divided by."""
        return int(self._row_loss_tokens[self._nonpadding_indices(step)].sum())

    def positions(self, step: int) -> int:
        """Of a step's batches over all ranks, padding counted."""
        total = 0
        for micro in self._micro_batch_indices(step).reshape(-1, self._micro_batch):
            longest = int(np.where(micro == PADDING_ROW, 0, self._tokens[micro]).max())
            total += self.sources[0][0].length(longest) * len(micro)
        return total

    def padding(self, steps: int) -> float:
        """The part of all positions of a run of so many steps that is padding, from a sample of its first epoch."""
        steps = min(steps, math.ceil(self.rows_per_epoch / self._global_batch))
        sample = np.unique(np.linspace(0, steps - 1, _SAMPLED_STEPS).astype(np.int64)).tolist()
        padded = 0
        for step in sample:
            padded += self.positions(step)
        return 1 - sum(map(self.tokens, sample)) / padded

    def _nonpadding_indices(self, step: int) -> npt.NDArray[np.integer]:
        indices = self.indices(step)
        filled: npt.NDArray[np.bool_] = indices != PADDING_ROW
        return indices[filled]

    def _micro_batch_indices(self, step: int) -> npt.NDArray[np.integer]:
        """int[accumulation, rank, micro_batch]. What would be empty on all ranks is left out, by all of them."""
        dealt = self.indices(step).reshape(-1, self._world_size, self._micro_batch)
        filled: npt.NDArray[np.bool_] = (dealt != PADDING_ROW).any(axis=(1, 2))
        return dealt[filled]

    def _collate_indices(self, indices: npt.NDArray[np.integer]) -> Batch:
        rows = []
        for index in indices.tolist():
            source = int(np.searchsorted(self._source_offsets, index, side="right")) - 1
            rows.append(
                EMPTY_ROW
                if index == PADDING_ROW
                else self.sources[source][0].row(index - int(self._source_offsets[source]))
            )
        return self.sources[0][0].collate(rows)

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.integer]:
        if epoch not in self._epoch_orders:
            order = shuffled_epoch(epoch, self._source_sizes, self._seed)
            if self._group_by_length:
                position = rows_before(epoch, self._source_sizes)
                order = length_grouped_order(order, self._tokens, self._global_batch, position, epoch, self._seed)
            # two of them: a step at an epoch's end is looked up several times
            self._epoch_orders = {e: o for e, o in self._epoch_orders.items() if e == epoch - 1} | {epoch: order}
        return self._epoch_orders[epoch]


def eval_batches(dataset: PackedDataset, *, micro_batch: int, rank: int, world_size: int) -> list[Batch]:
    """This rank's part of the whole data set, dealt out as [batch, rank, micro_batch]: in order, without packing the
    longest first.

    Every rank has the same number of batches, or the ranks' collectives would wait for each other forever;
    the last batches are completed with rows of padding, whose labels are all -100.
    """
    assert 0 <= rank < world_size
    unit = world_size * micro_batch
    batches = -(-len(dataset) // unit)
    row_indices = np.full(batches * unit, PADDING_ROW, dtype=np.int64)
    row_indices[: len(dataset)] = (
        np.arange(len(dataset)) if dataset.packed else np.argsort(-dataset.tokens, kind="stable")
    )
    return [dataset.batch(micro) for micro in row_indices.reshape(batches, world_size, micro_batch)[:, rank]]
