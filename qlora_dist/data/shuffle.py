"""Order of the rows: pure functions of seed and position, so that resuming needs no state.

The order is one endless stream of row indices, epoch after epoch. Rows are numbered through all sources, one after
another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SourceSizes = Sequence[tuple[int, float]]
"""Rows and weight of each source."""
MEGA_BATCH_MULT = 50
"""Batches that are sorted together when rows are grouped by length. With more, the order would be less random and save
hardly any padding."""


def rows_before(epoch: int, sources: SourceSizes) -> int:
    """Return the rows of the stream before this epoch, which is counted from 0."""
    return sum(round(epoch * count * weight) for count, weight in sources)


def rows_in_epochs(epochs: float, sources: SourceSizes) -> int:
    """Return the rows of the stream in `epochs` epochs, rounded, at least 1."""
    whole = int(epochs)
    start, end = rows_before(whole, sources), rows_before(whole + 1, sources)
    return max(1, start + round((epochs - whole) * (end - start)))


def epoch_of_position(position: int, sources: SourceSizes) -> int:
    epoch = int(position / sum(count * weight for count, weight in sources))
    while rows_before(epoch, sources) > position:
        epoch -= 1
    while rows_before(epoch + 1, sources) <= position:
        epoch += 1
    return epoch


def shuffled_epoch(epoch: int, sources: SourceSizes, seed: int) -> npt.NDArray[np.integer]:
    """Return the rows of an epoch, shuffled.

    Each source has an endless stream of its own: one permutation of its rows after another. Epoch e takes its positions
    from round(e * rows * weight) to round((e + 1) * rows * weight). At weight 0.5, two epochs therefore take each row
    exactly once; at weight 1, each epoch does.

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
            # A whole pass needs no permutation, because the epoch is shuffled below.
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
    """Return the shuffled rows of an epoch, ordered so that the rows of a step have similar lengths.

    `MEGA_BATCH_MULT` batches at a time are sorted by length and cut into batches. The batches of the epoch are then
    shuffled. Rows at the ends of the epoch that share a step with another epoch keep their positions. `lengths` are the
    tokens of each row of all sources, `start_position` the place of the epoch's first row in the stream.
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
    # numpy takes no negative seeds. Two's complement keeps -1 and 1 different.
    return np.random.Generator(np.random.PCG64([seed % 2**64, *key]))
