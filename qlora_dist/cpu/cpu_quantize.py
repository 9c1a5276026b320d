"""4-bit codes on a CPU, many times as fast as bitsandbytes 0.50 and with the same bits.

bitsandbytes finds each weight's code by a binary search among 15 bounds, in fp32, one weight after the other. Here
every weight is compared with every bound, and a code is the number of bounds below: four times the comparisons, but in
vector instructions that do 16 to 64 at a time. All 15 are one call of numpy's, and their sum another: torch's are
not vectorized, and threads that come back to Python after every bound wait for its lock half of the time.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_SMALLEST_ABSMAX = 1e-38  # what bitsandbytes divides by in a block of zeros
_PIECE = 2**17  # weights that are scaled at a time: 0.5 MiB of fp32, for a core's second cache
_COMPARED = 2**15  # weights that are compared at a time: 15 comparisons each, 0.5 MiB in all


def quantize_4bit_cpu(weights: torch.Tensor, block_size: int, bounds: CodeBounds) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and absmax of whole blocks.

    Args:
        weights: bf16, fp16 or fp32[n] on the CPU, finite, n a multiple of `block_size`.
        block_size: weights per absmax.
        bounds: the code table, as `CodeBounds.from_code_table` gives it.

    Returns:
        uint8[n / 2], the first weight of a pair in the high half, and fp32[n / block_size].

    The floating-point operations are those of `bitsandbytes::quantize_4bit`'s default kernel, in its order; it cuts to
    -1 .. 1 as well, which changes no comparison. Any number of threads may call this at the same time.
    """
    codes = torch.empty(weights.numel() // 2, dtype=torch.uint8)
    absmax = torch.empty(weights.numel() // block_size)
    pairs, table, scratch = codes.numpy(), bounds, _scratch()
    for start in range(0, weights.numel(), _PIECE):
        piece = weights[start : start + _PIECE].view(-1, block_size)
        piece_absmax = absmax[start // block_size :][: len(piece)]
        blocks = scratch.scaled[: piece.numel()].view(piece.shape).copy_(piece)
        torch.abs(blocks, out=scratch.magnitudes[: piece.numel()].view(piece.shape))
        torch.amax(scratch.magnitudes[: piece.numel()].view(piece.shape), 1, out=piece_absmax)
        blocks.mul_(piece_absmax.clamp(min=_SMALLEST_ABSMAX).reciprocal_().unsqueeze(1))
        scaled, piece_codes = blocks.view(-1).numpy(), scratch.codes[: piece.numel()]
        for first in range(0, piece.numel(), _COMPARED):
            table.encode(scaled[first : first + _COMPARED], piece_codes[first : first + _COMPARED])
        # Little-endian, the first of a pair is the low byte: 16 times it, plus the second, becomes the high byte.
        np.multiply(piece_codes.view(np.uint16), np.uint16(0x1001), out=piece_codes.view(np.uint16))
        pairs[start // 2 :][: len(piece_codes) // 2] = piece_codes[1::2]
    return codes, absmax


class _Scratch(threading.local):
    """Each thread's own, made once: memory that the system gives and takes back for every piece costs as much time as
    the work in it.
    """

    def __init__(self) -> None:
        self.scaled = torch.empty(_PIECE)
        self.magnitudes = torch.empty(_PIECE)
        self.codes = np.empty(_PIECE, dtype=np.uint8)
        self.above = np.empty((15, _COMPARED), dtype=np.bool_)


@functools.cache
def _scratch() -> _Scratch:
    """Made when something is quantized: who loads a folder in 4 bit holds none."""
    return _Scratch()


@dataclass(frozen=True)
class CodeBounds:
    """Code table of a 4-bit type, as the bounds between neighbouring codes."""

    bounds: npt.NDArray[np.float32]
    """fp32[15]: half way between neighbouring code values, ascending."""
    first: int
    """The code of what lies below all bounds."""
    changes: npt.NDArray[np.uint8] | None
    """uint8[15]: by how much the code changes at each bound, modulo 256; None where it is always 1 (NF4)."""

    @classmethod
    def from_code_table(cls, values: torch.Tensor) -> CodeBounds:
        """Compute the bounds.

        Args:
            values: fp32[16] on the CPU, the value of each code.
        """
        order = torch.argsort(values)
        ranked = values[order]
        bounds = (ranked[:-1] + ranked[1:]) / 2
        changes = order.diff().remainder(256).to(torch.uint8).numpy()
        return cls(bounds.numpy(), int(order[0]), None if (changes == 1).all() else changes)

    def encode(self, scaled: npt.NDArray[np.float32], codes: npt.NDArray[np.uint8]) -> None:
        """Fill `codes: uint8[n]` with the codes of `scaled: fp32[n]`, n at most _COMPARED."""
        above = _scratch().above[:, : scaled.size]
        np.greater(scaled, self.bounds[:, np.newaxis], out=above)
        changes = above.view(np.uint8)
        if self.changes is not None:
            np.multiply(changes, self.changes[:, np.newaxis], out=changes)
        np.add.reduce(changes, axis=0, dtype=np.uint8, out=codes)
        if self.first:
            np.add(codes, np.uint8(self.first), out=codes)
