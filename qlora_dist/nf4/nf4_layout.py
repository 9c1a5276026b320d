"""Where each part of a quantized weight lies in its one byte vector. Arithmetic only: no torch in here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qlora_dist.runtime.byte_sizes import align_bytes

NESTED_BLOCK_SIZE = 256
"""absmax values that share one nested absmax (bitsandbytes.functional.quantize_4bit, compress_statistics)."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

QuantType = Literal["nf4", "fp4"]


@dataclass(frozen=True)
class NF4Layout:
    """A quantized weight as `packed: uint8[total_bytes]`.

    codes | absmax | nested absmax | offset, each part starting at a multiple of 16 bytes:

    - codes: two 4-bit codes a byte, the first of the pair in the high half; ceil(numel / 2) bytes
    - absmax: one per block, uint8 with double quantization, else fp32
    - nested absmax: fp32, one per 256 absmax values (double quantization only)
    - offset: one fp32, the mean of all absmax before they were quantized (double quantization only)

    A plain vector of bytes can be cut anywhere: a rank's shard needs to know nothing of blocks.
    """

    shape: tuple[int, ...]
    """Shape of the weight, [out_features, in_features]."""
    quant_type: QuantType = "nf4"
    block_size: int = 64
    double_quant: bool = True
    dtype: str = "bfloat16"
    """What the weight was before ('bfloat16', 'float16', 'float32'). bitsandbytes dequantizes to this type before
    it casts to the compute type, and so do we."""

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size {self.block_size} is none of {BLOCK_SIZES}")
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape {self.shape} has no elements")

    @property
    def numel(self) -> int:
        """Weights in the matrix."""
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        """Number of absmax values; the last block may be short."""
        return -(-self.numel // self.block_size)

    @property
    def codes(self) -> slice:
        """Bytes of the 4-bit codes."""
        return slice(0, -(-self.numel // 2))

    @property
    def absmax(self) -> slice:
        """Bytes of the absmax values."""
        start = align_bytes(self.codes.stop)
        return slice(start, start + self.num_blocks * (1 if self.double_quant else 4))

    @property
    def nested_absmax(self) -> slice:
        """Bytes of the nested absmax values; empty without double quantization."""
        start = align_bytes(self.absmax.stop)
        return slice(start, start + (4 * -(-self.num_blocks // NESTED_BLOCK_SIZE) if self.double_quant else 0))

    @property
    def offset(self) -> slice:
        """Bytes of the offset; empty without double quantization."""
        start = align_bytes(self.nested_absmax.stop)
        return slice(start, start + (4 if self.double_quant else 0))

    @property
    def total_bytes(self) -> int:
        """Length of the vector."""
        return align_bytes(self.offset.stop)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight, padding included: 4 + 8/64 + 32/(64*256) = 4.127 for large matrices."""
        return 8 * self.total_bytes / self.numel
