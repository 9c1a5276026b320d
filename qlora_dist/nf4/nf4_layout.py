"""Layout of a quantized weight in one vector of bytes. It is arithmetic only, and does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qlora_dist.runtime.byte_sizes import align_bytes

NESTED_BLOCK_SIZE = 256
"""Number of absmax values that share a nested absmax (`compress_statistics` of bitsandbytes' `quantize_4bit`)."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

QuantType = Literal["nf4", "fp4"]


@dataclass(frozen=True, kw_only=True)
class NF4Layout:
    """Layout of a quantized weight in `packed: uint8[total_bytes]`.

    Each of these parts, whose bytes the properties return, starts at a multiple of 16 bytes:

    - codes: two 4-bit codes per byte, the first in the high half; ceil(numel / 2) bytes
    - absmax: one per block, uint8 with double quantization, else fp32
    - nested absmax: fp32, one per 256 absmax values (double quantization only)
    - offset: one fp32, the mean of all absmax values before their quantization (double quantization only)

    A large matrix has 4 + 8/64 + 32/(64*256) = 4.127 bits per weight. A vector of bytes can be sharded anywhere, so
    shards do not depend on blocks.
    """

    shape: tuple[int, ...]
    """Shape of the weight, [out_features, in_features]."""
    quant_type: QuantType = "nf4"
    block_size: int = 64
    double_quant: bool = True
    dtype: str = "bfloat16"
    """Type of the original weight ('bfloat16', 'float16', 'float32'). As in bitsandbytes, values are dequantized to it
    before they are cast to the compute type."""

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size {self.block_size} is not one of {BLOCK_SIZES}")
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape {self.shape} has no elements")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        return -(-self.numel // self.block_size)

    @property
    def codes(self) -> slice:
        return slice(0, -(-self.numel // 2))

    @property
    def absmax(self) -> slice:
        start = align_bytes(self.codes.stop)
        return slice(start, start + self.num_blocks * (1 if self.double_quant else 4))

    @property
    def nested_absmax(self) -> slice:
        start = align_bytes(self.absmax.stop)
        return slice(start, start + (4 * -(-self.num_blocks // NESTED_BLOCK_SIZE) if self.double_quant else 0))

    @property
    def offset(self) -> slice:
        start = align_bytes(self.nested_absmax.stop)
        return slice(start, start + (4 if self.double_quant else 0))

    @property
    def total_bytes(self) -> int:
        return align_bytes(self.offset.stop)
