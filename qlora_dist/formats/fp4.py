"""Values of FP4 codes (E2M1), two in a byte, which MXFP4 and NVFP4 share."""

from __future__ import annotations

import functools

import torch

from qlora_dist.formats.row_pieces import is_plain_cpu

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the codes 0 to 15, as in `transformers.integrations.mxfp4.FP4_VALUES`."""


@functools.cache
def _pairs_of_bytes(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return bf16[256, 2], the values of the two codes in a byte, of the low half first."""
    table, codes = torch.tensor(values, dtype=torch.bfloat16), torch.arange(256)
    return torch.stack([table[codes & 15], table[codes >> 4]], dim=1).to(device)


def fp4_values(codes: torch.Tensor, values: tuple[float, ...] = FP4_VALUES) -> torch.Tensor:
    """Return bf16[2 n] in new memory: the values of the codes in n bytes, in any shape, uint8 or int8.

    `values` are the values of the 16 codes, which bf16 holds exactly.
    """
    if is_plain_cpu(codes) and codes.is_contiguous() and codes.numel() % 2 == 0:
        from qlora_dist.cpu.code_tables import fp4_values_cpu

        return fp4_values_cpu(codes, values)
    index = codes.reshape(-1).view(torch.uint8).int()
    return _pairs_of_bytes(values, codes.device).index_select(0, index).view(-1)
