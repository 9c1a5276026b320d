"""Tables of the values of 8-bit and 4-bit codes."""

from __future__ import annotations

import functools

import torch

from qlora_dist.compat.bitsandbytes import functional as bnb
from qlora_dist.nf4.nf4_layout import QuantType


@functools.cache
def nested_code_table(device: torch.device) -> torch.Tensor:
    """Return fp32[256], the values of the 8-bit codes of double quantization.

    Do not call it in a module's constructor. DeepSpeed's `zero.Init` casts every float tensor that is created under
    it, and a bf16 table read as fp32 gives NaN without an error.
    """
    table: torch.Tensor = bnb.create_dynamic_map()
    return table.to(device)


@functools.cache
def code_table(quant_type: QuantType) -> torch.Tensor:
    """Return fp32[16] on the CPU, the values of the 4-bit codes."""
    # bitsandbytes' default device is "cuda"
    table: torch.Tensor = bnb.get_4bit_type(quant_type, device="cpu")
    return table
