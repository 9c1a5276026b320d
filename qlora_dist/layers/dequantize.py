"""Dequantization of a byte vector, in 4 bit or in a published format."""

from __future__ import annotations

import torch

from qlora_dist.formats.published_layout import PublishedLayout
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quantize import dequantize_weight

WeightLayout = NF4Layout | PublishedLayout


def dequantize(packed: torch.Tensor, layout: WeightLayout, dtype: torch.dtype) -> torch.Tensor:
    """Return dtype[layout.shape], the weight that `packed: uint8[layout.total_bytes]` encodes.

    Values are rounded to `layout.dtype` first.
    """
    if isinstance(layout, NF4Layout):
        return dequantize_weight(packed, layout, dtype)
    return layout.dequantize(packed, dtype)


def describe_layout(layout: WeightLayout) -> str:
    """Return a layout's format for the printed form of a module."""
    if isinstance(layout, NF4Layout):
        return f"{layout.quant_type}, block_size={layout.block_size}"
    return type(layout).__name__.removesuffix("Layout").lower()
