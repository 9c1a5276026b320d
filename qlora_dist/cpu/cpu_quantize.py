"""4-bit codes on a CPU, with the same bits as bitsandbytes 0.50 and many times as fast.

bitsandbytes finds each weight's code by a binary search among 15 bounds, in fp32, for one weight at a time. Here every
weight is compared with every bound, and a code is the number of bounds below the weight. That is four times the
comparisons, but vector instructions do 16 to 64 at a time.

One call of numpy compares with all 15 bounds, and another sums the results. torch's comparisons are not vectorized.
Threads that return to Python after every bound would wait for its lock half of the time.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_SMALLEST_ABSMAX = 1e-38  # bitsandbytes divides by it in a block of zeros
_SCALED_WEIGHTS = 2**17  # weights that are scaled at a time: 0.5 MiB of fp32, for a core's second-level cache
_COMPARED = 2**15  # weights that are compared at a time: 15 comparisons each, 0.5 MiB in all


def quantize_4bit_cpu(weights: torch.Tensor, block_size: int, bounds: CodeBounds) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, uint8[n / 2], and absmax values, fp32[n / block_size], of whole blocks.

    The floating-point operations and their order are as in `bitsandbytes::quantize_4bit`'s default kernel. The kernel
    also clamps to -1 .. 1, which changes no comparison. Any number of threads may call this at the same time.

    The weights are bf16, fp16 or fp32[n] on the CPU and finite. The first weight of a pair is in a byte's high half.
    """
    codes = torch.empty(weights.numel() // 2, dtype=torch.uint8)
    absmax = torch.empty(weights.numel() // block_size)
    pairs, scratch = codes.numpy(), _scratch()
    for start in range(0, weights.numel(), _SCALED_WEIGHTS):
        chunk = weights[start : start + _SCALED_WEIGHTS].view(-1, block_size)
        chunk_absmax = absmax[start // block_size :][: len(chunk)]
        blocks = scratch.scaled[: chunk.numel()].view(chunk.shape).copy_(chunk)
        torch.abs(blocks, out=scratch.magnitudes[: chunk.numel()].view(chunk.shape))
        torch.amax(scratch.magnitudes[: chunk.numel()].view(chunk.shape), 1, out=chunk_absmax)
        blocks.mul_(chunk_absmax.clamp(min=_SMALLEST_ABSMAX).reciprocal_().unsqueeze(1))
        scaled, chunk_codes = blocks.view(-1).numpy(), scratch.codes[: chunk.numel()]
        for first in range(0, chunk.numel(), _COMPARED):
            bounds.encode(scaled[first : first + _COMPARED], chunk_codes[first : first + _COMPARED])
        # In little-endian order the first code of a pair is the low byte. The high byte becomes 16 x first + second.
        np.multiply(chunk_codes.view(np.uint16), np.uint16(0x1001), out=chunk_codes.view(np.uint16))
        pairs[start // 2 :][: len(chunk_codes) // 2] = chunk_codes[1::2]
    return codes, absmax


class _Scratch(threading.local):
    """Buffers of each thread, allocated once: allocating them per chunk costs as much time as the work."""

    def __init__(self) -> None:
        self.scaled = torch.empty(_SCALED_WEIGHTS)
        self.magnitudes = torch.empty(_SCALED_WEIGHTS)
        self.codes = np.empty(_SCALED_WEIGHTS, dtype=np.uint8)
        self.above = np.empty((15, _COMPARED), dtype=np.bool_)


@functools.cache
def _scratch() -> _Scratch:
    """Allocate the buffers at first use, so that loading a 4-bit folder does not need them."""
    return _Scratch()


@dataclass(frozen=True)
class CodeBounds:
    """Bounds between neighbouring codes of a 4-bit code table."""

    bounds: npt.NDArray[np.float32]
    """fp32[15], the midpoints of neighbouring code values, ascending."""
    first: int
    """Code of values below all bounds."""
    changes: npt.NDArray[np.uint8] | None
    """uint8[15], the change of the code at each bound, modulo 256; None if it is always 1 (NF4)."""

    @classmethod
    def from_code_table(cls, values: torch.Tensor) -> CodeBounds:
        """Compute the bounds from the codes' values, fp32[16] on the CPU."""
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
