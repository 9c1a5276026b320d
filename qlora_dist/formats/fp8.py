"""FP8 weights with scales: blocks of 128 x 128 (DeepSeek-V3, Qwen3, MiniMax-M2), rows, or whole tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_dist.formats.published_layout import LayoutPart, PublishedLayout
from qlora_dist.nf4.quantize import TORCH_DTYPES


@dataclass(frozen=True, kw_only=True)
class Fp8Layout(PublishedLayout):
    """Codes in FP8, [out_features, in_features], and scales that divide them into equal blocks.

    The value of a weight is code * scale, computed in fp32 and rounded to `dtype`.

    Source: `transformers.integrations.finegrained_fp8.Fp8Dequantize`. It requires that the blocks divide the shape,
    whereas the last blocks may be smaller here, as DeepSeek's own `weight_dequant` allows.
    """

    code_dtype: torch.dtype = torch.float8_e4m3fn
    scale_dtype: torch.dtype = torch.float32
    scale_shape: tuple[int, ...] = ()
    block: tuple[int, int] = (128, 128)
    """Rows and columns of a block."""
    scale_suffix: str = ".weight_scale_inv"

    @property
    def parts(self) -> tuple[LayoutPart, ...]:
        weight_rows = self.block[0] if len(self.scale_shape) == 2 and self.scale_shape[0] > 1 else 0
        return (
            LayoutPart(suffix=".weight", dtype=self.code_dtype, shape=self.shape, weight_rows=1),
            LayoutPart(
                suffix=self.scale_suffix, dtype=self.scale_dtype, shape=self.scale_shape, weight_rows=weight_rows
            ),
        )

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        codes, scales = parts
        weight, scales = codes.float(), scales.float()
        if scales.numel() == 1:
            return weight.mul_(scales.view(())).to(TORCH_DTYPES[self.dtype])
        (rows, columns), (block_rows, block_columns) = weight.shape, self.block
        if block_rows > 1:
            scales = scales.repeat_interleave(block_rows, dim=0)[:rows]
        if block_columns < columns:
            scales = scales.repeat_interleave(block_columns, dim=1)[:, :columns]
        return weight.mul_(scales).to(TORCH_DTYPES[self.dtype])
