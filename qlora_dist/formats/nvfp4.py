"""NVFP4 weights: FP4 codes, an FP8 scale for every 16 weights of a row, and one scale for the whole weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_dist.formats.folder_tensors import check_tensor, damaged_tensor_error
from qlora_dist.formats.fp4 import fp4_values
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.formats.published_layout import LayoutPart, PublishedLayout
from qlora_dist.formats.row_pieces import decode_in_pieces
from qlora_dist.io.safetensors_file import TensorEntry
from qlora_dist.nf4.quantize import TORCH_DTYPES

NVFP4_GROUP = 16
"""Weights of a row that share a scale, as in `transformers.integrations.nvfp4.SF_VEC_SIZE`."""


@dataclass(frozen=True, kw_only=True)
class Nvfp4Layout(PublishedLayout):
    """Codes in FP4, two in a byte, the low half first, with scales of 16 weights, and one of the whole weight.

    The value of a weight is code * (scale / global_scale) for compressed-tensors, and code * (scale * global_scale) for
    NVIDIA's ModelOpt. It is computed in fp32 and rounded to `dtype`, by compressed-tensors to bf16 before.

    Sources: `compressed_tensors.compressors.nvfp4.NVFP4PackedCompressor.decompress`, and
    `modelopt.torch.quantization.qtensor.nvfp4_tensor.NVFP4QTensor.dequantize`.
    """

    is_modelopt: bool = False
    global_shape: tuple[int, ...] = (1,)

    @property
    def parts(self) -> tuple[LayoutPart, ...]:
        rows, columns = self.shape
        codes, whole = (
            (".weight", ".weight_scale_2") if self.is_modelopt else (".weight_packed", ".weight_global_scale")
        )
        return (
            LayoutPart(suffix=codes, dtype=torch.uint8, shape=(rows, columns // 2), weight_rows=1),
            LayoutPart(
                suffix=".weight_scale", dtype=torch.float8_e4m3fn, shape=(rows, columns // NVFP4_GROUP), weight_rows=1
            ),
            LayoutPart(suffix=whole, dtype=torch.float32, shape=self.global_shape, weight_rows=0),
        )

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        codes, scales, whole = parts
        whole = whole.view(1)

        def decode_rows(rows: slice) -> torch.Tensor:
            factors = scales[rows].float()
            factors = factors.mul_(whole) if self.is_modelopt else factors.div_(whole)
            groups = fp4_values(codes[rows]).float().view(-1, scales.shape[1], NVFP4_GROUP)
            weight = groups.mul_(factors.unsqueeze(-1)).view(-1, self.shape[1])
            return weight if self.is_modelopt else weight.bfloat16()

        out = torch.empty(len(codes), self.shape[1], dtype=TORCH_DTYPES[self.dtype], device=codes.device)
        return decode_in_pieces(decode_rows, out)


def make_nvfp4(
    name: str, parts: tuple[TensorEntry, TensorEntry, TensorEntry], dtype: str, *, is_modelopt: bool = False
) -> PublishedWeightEntry:
    """Return a weight in NVFP4. `name` names its codes, the first of its parts.

    Raises:
        UserError: a part has another type or shape.
    """
    codes, _, whole = parts
    if len(codes.shape) != 2 or codes.shape[1] * 2 % NVFP4_GROUP:
        raise damaged_tensor_error(codes, name, f"has shape {list(codes.shape)}, not rows of groups of {NVFP4_GROUP}")
    layout = Nvfp4Layout(
        shape=(codes.shape[0], 2 * codes.shape[1]),
        dtype=dtype,
        is_modelopt=is_modelopt,
        global_shape=whole.shape if is_modelopt and whole.shape == () else (1,),
    )
    stem = name.removesuffix(layout.parts[0].suffix)
    for part, entry in zip(layout.parts, parts, strict=True):
        check_tensor(entry, stem + part.suffix, part.dtype, part.shape)
    return PublishedWeightEntry(layout, parts)
