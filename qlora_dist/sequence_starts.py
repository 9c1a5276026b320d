"""The positions at which the sequences of packed rows begin."""

from __future__ import annotations

import torch

_MULTIPLE = 64  # padding to a multiple gives a compiled layer one shape for nearly all batches


def sequence_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the first position of each sequence of each row.

    Args:
        position_ids: int64[batch, length]. It increases by one within a sequence, and not at a sequence's start.

    Returns:
        int32[1, 1, batch, n] on the CPU: the first positions in ascending order, padded with `length`. They are on the
        CPU because lengths are needed there. So a forward pass waits for the device once, not once per layer.
    """
    batch, length = position_ids.shape
    begins = torch.ones(batch, length, dtype=torch.bool, device=position_ids.device)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    begins = begins.cpu()
    most = int(begins.sum(dim=1).max()) + 1
    result = torch.full((1, 1, batch, -(-most // _MULTIPLE) * _MULTIPLE), length, dtype=torch.int32)
    for row in range(batch):
        starts = begins[row].nonzero().flatten()
        result[0, 0, row, : len(starts)] = starts
    return result


def sequence_slices(starts: torch.Tensor, length: int) -> list[tuple[slice, int, int]]:
    """Return (rows, first, end) of each sequence. If every row is one sequence, all rows form one slice.

    Args:
        starts: result of `sequence_starts`.
        length: positions of a row.
    """
    rows = [[start for start in row if start < length] for row in starts[0, 0].tolist()]
    if all(row == [0] for row in rows):
        return [(slice(0, len(rows)), 0, length)]
    return [
        (slice(index, index + 1), first, end)
        for index, row in enumerate(rows)
        for first, end in zip(row, [*row[1:], length], strict=True)
    ]
