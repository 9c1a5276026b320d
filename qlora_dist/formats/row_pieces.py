"""Decoding of a published format by pieces of rows, on all cores of a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qlora_dist.runtime.threads import parallel_for_each

_PIECE_WEIGHTS = 2**19
"""Weights of a piece on a CPU. Their fp32 values stay in a core's cache."""


def is_plain_cpu(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is an ordinary one on the CPU, so that kernels for CPUs may be used.

    A tensor of a subclass has no bytes, as in a trace. `torch.compile` does not follow these kernels.
    """
    return type(tensor) is torch.Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def decode_in_pieces(decode: Callable[[slice], torch.Tensor], out: torch.Tensor, *, row_unit: int = 1) -> torch.Tensor:
    """Fill `out: dtype[rows, columns]` with the results of `decode(rows)`, and return it.

    On a CPU it is called in all threads, with pieces that begin at a multiple of `row_unit`. Elsewhere it is called
    once.
    """
    rows, columns = out.shape
    step = max(rows, 1)
    if is_plain_cpu(out):
        step = row_unit * max(1, _PIECE_WEIGHTS // max(columns * row_unit, 1))

    def fill_from(first: int) -> None:
        piece = slice(first, min(first + step, rows))
        out[piece] = decode(piece)

    parallel_for_each(fill_from, range(0, rows, step))
    return out
