"""How many rows a chain of element-wise operations takes at a time."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor


def rows_per_chunk(tensor: torch.Tensor, elements: int) -> int:
    """On a CPU as many rows of tensor[n, m] as have so many elements, so that a cache holds what passes between.

    Elsewhere all of them: a GPU's kernels are launched one by one, and its memory is fast. Tensors without memory
    stand for a GPU's (`trace/trace_step.py`).
    """
    rows, columns = tensor.shape
    if tensor.device.type != "cpu" or isinstance(tensor, FakeTensor):
        return max(1, rows)
    return max(1, elements // columns)
