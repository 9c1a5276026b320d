"""Values of small codes on a CPU by tables, several times as fast as by torch's own conversions.

Two or four codes are one index of 16 bits, and the table's element is all their values as one number of 64 bits. So
`index_select`, which copies one element at a time, writes several values in one step.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def _pair_table(dtype: torch.dtype) -> torch.Tensor:
    """Return float64[65536]: the fp32 values of two codes of an FP8 type, in the order of their bytes."""
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    return codes.view(dtype).float().view(torch.float64)


def fp8_values_cpu(codes: torch.Tensor) -> torch.Tensor:
    """Return fp32[rows, columns], the values of contiguous FP8 codes of this shape on the CPU.

    They equal `codes.float()`.
    """
    if codes.numel() % 2:
        return codes.float()
    index = codes.view(-1).view(torch.uint8).view(torch.uint16).int()
    return _pair_table(codes.dtype).index_select(0, index).view(torch.float32).view(codes.shape)


@functools.cache
def _fp4_table(values: tuple[float, ...]) -> torch.Tensor:
    """Return float64[65536]: the bf16 values of four codes of 4 bits, each byte's low half first."""
    table = torch.tensor(values, dtype=torch.bfloat16)
    codes = torch.arange(2**16, dtype=torch.int32)
    return torch.stack([table[(codes >> shift) & 15] for shift in (0, 4, 8, 12)], dim=1).view(torch.float64).view(-1)


def fp4_values_cpu(codes: torch.Tensor, values: tuple[float, ...]) -> torch.Tensor:
    """Return bf16[2 n], the values of codes of 4 bits in contiguous bytes, uint8 or int8[n] with an even n."""
    index = codes.view(-1).view(torch.uint16).int()
    return _fp4_table(values).index_select(0, index).view(torch.bfloat16)
