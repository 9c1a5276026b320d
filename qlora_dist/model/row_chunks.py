"""Number of rows that a chain of element-wise operations processes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_simulates_gpu = False


def rows_per_chunk(tensor: torch.Tensor, elements: int) -> int:
    """Return the number of rows of tensor[n, m] in one chunk.

    On a CPU a chunk has at most `elements` elements, so that a core's cache holds the intermediate results. On a GPU it
    is the whole tensor, because each chunk would launch kernels of its own.
    """
    rows, columns = tensor.shape
    if tensor.device.type != "cpu" or _simulates_gpu:
        return max(1, rows)
    return max(1, elements // columns)


@contextmanager
def whole_tensors() -> Iterator[None]:
    """Process whole tensors on a CPU too, while they simulate a GPU's."""
    global _simulates_gpu
    before, _simulates_gpu = _simulates_gpu, True
    try:
        yield
    finally:
        _simulates_gpu = before
