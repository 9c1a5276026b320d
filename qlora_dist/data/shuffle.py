"""Which rows come when: pure functions of the seed and the position, so that resuming is arithmetic.

The order is one endless stream of row numbers, epoch after epoch. Rows are numbered through all sources, one source
behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SourceSizes = Sequence[tuple[int, float]]
"""Rows and weight of each source."""
MEGA_BATCH_MULT = 50
"""Batches that are sorted together when rows are grouped by length: more would leave less to chance, and hardly less to
pad."""


def rows_before(epoch: int, sources: SourceSizes) -> int:
    """Rows of the stream before this epoch, counted from 0."""
    return sum(round(epoch * count * weight) for count, weight in sources)


def rows_in_epochs(epochs: float, sources: SourceSizes) -> int:
    """Rows of the stream in so many epochs, the last of which may be a part; at least one."""
    whole = int(epochs)
    start, end = rows_before(whole, sources), rows_before(whole + 1, sources)
    return max(1, start + round((epochs - whole) * (end - start)))


def epoch_of_position(position: int, sources: SourceSizes) -> int:
    """The epoch that holds a position of the stream."""
    epoch = int(position / sum(count * weight for count, weight in sources))
    while rows_before(epoch, sources) > position:
        epoch -= 1
    while rows_before(epoch + 1, sources) <= position:
        epoch += 1
    return epoch


def shuffled_epoch(epoch: int, sources: SourceSizes, seed: int) -> npt.NDArray[np.integer]:
    """The rows of an epoch, shuffled.

    Each source has an endless stream of its own, one permutation of its rows after another; epoch e takes the positions
    from round(e x rows x weight) to round((e + 1) x rows x weight) of it. So at weight 0.5 two epochs take each row
    exactly once, at weight 1 each epoch does.

    Returns:
        int32[rows_before(epoch + 1) - rows_before(epoch)], or int64 from 2^31 rows on.
    """
    dtype = np.int32 if sum(count for count, _ in sources) < 2**31 else np.int64
    parts = []
    first = 0
    for source, (count, weight) in enumerate(sources):
        begin, end = (round(e * count * weight) for e in (epoch, epoch + 1))
        for pass_index in range(begin // count, -(-end // count)):
            lap_slice = slice(max(begin - pass_index * count, 0), min(end - pass_index * count, count))
            rows = np.arange(first, first + count, dtype=dtype)
            # a whole lap needs no order of its own: the epoch is shuffled anyway
            parts.append(
                rows
                if lap_slice == slice(0, count)
                else _generator(seed, pass_index, source + 1).permutation(rows)[lap_slice]
            )
        first += count
    rows = np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
    return _generator(seed, epoch).permutation(rows)


def length_grouped_order(
    row_order: npt.NDArray[np.integer],
    lengths: npt.NDArray[np.integer],
    global_batch: int,
    start_position: int,
    epoch: int,
    seed: int,
) -> npt.NDArray[np.integer]:
    """The same rows, so that those of a step have similar lengths.

    `MEGA_BATCH_MULT` batches at a time are sorted by length, cut into batches, and the epoch's batches are shuffled. The
    rows at the epoch's ends that share a step with another epoch stay as they are.

    Args:
        row_order: the rows of an epoch, shuffled.
        lengths: tokens of each row of all sources.
        global_batch: rows of a step.
        start_position: of the epoch's first row in the stream.
        epoch: its number.
        seed: of the order.
    """
    begin = min(-start_position % global_batch, len(row_order))
    end = begin + (len(row_order) - begin) // global_batch * global_batch
    full_batches = row_order[begin:end].copy()
    for start in range(0, len(full_batches), MEGA_BATCH_MULT * global_batch):
        mega_batch = full_batches[start : start + MEGA_BATCH_MULT * global_batch]
        mega_batch[:] = mega_batch[np.argsort(lengths[mega_batch], kind="stable")]
    batches = _generator(seed, epoch, 0, 1).permutation(full_batches.reshape(-1, global_batch))
    return np.concatenate([row_order[:begin], batches.reshape(-1), row_order[end:]])


def _generator(seed: int, *key: int) -> np.random.Generator:
    # numpy takes no negative seeds; two's complement keeps -1 and 1 apart
    return np.random.Generator(np.random.PCG64([seed % 2**64, *key]))
