"""FP8 weights with scales: blocks of 128 x 128 (DeepSeek-V3, Qwen3, MiniMax-M2), rows, or whole tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.folder_tensors import (
    PublishedWeights,
    damaged_tensor_error,
    each_matrix,
    format_tensor,
    require_tensor,
)
from qlora_dist.formats.mxfp4 import exponents_to_powers, make_packed_mxfp4
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.formats.published_layout import LayoutPart, PublishedLayout
from qlora_dist.formats.row_pieces import decode_in_pieces, is_plain_cpu
from qlora_dist.io.safetensors_file import TensorEntry
from qlora_dist.nf4.quantize import TORCH_DTYPES

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_FP8_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_MODULE_SCALES = (".scale", ".qscale_weight")
"""Names of scales in a module that transformers renames to `.weight_scale_inv`: DeepSeek-V4, Mistral Large 4."""
INPUT_SCALES = (".input_scale", "activation_scale", ".qscale_act", ".input_scale_ub", ".k_scale", ".v_scale")
"""Ends of the names of tensors that only an FP8 matrix product, or an FP8 cache, needs."""


@dataclass(frozen=True, kw_only=True)
class Fp8Layout(PublishedLayout):
    """Codes in FP8, [out_features, in_features], and scales of equal blocks.

    The value of a weight is code * scale, computed in fp32 and rounded to `product_dtype` and to `dtype`.

    Source: `transformers.integrations.finegrained_fp8.Fp8Dequantize`. It requires that the blocks divide the shape,
    whereas the last blocks may be smaller here, as DeepSeek's own `weight_dequant` allows.
    `compressed_tensors.compressors.NaiveQuantizationCompressor.decompress` rounds the product to the type of the
    scales.
    """

    code_dtype: torch.dtype = torch.float8_e4m3fn
    scale_dtype: torch.dtype = torch.float32
    """uint8 holds the exponents of powers of two, as float8_e8m0fnu does."""
    scale_shape: tuple[int, ...] = ()
    block: tuple[int, int] = (128, 128)
    """Rows and columns of a block."""
    product_dtype: torch.dtype = torch.float32
    code_suffix: str = ".weight"
    scale_suffix: str = ".weight_scale_inv"

    @property
    def parts(self) -> tuple[LayoutPart, ...]:
        weight_rows = self.block[0] if math.prod(self.scale_shape) > 1 and self.scale_shape[0] > 1 else 0
        return (
            LayoutPart(suffix=self.code_suffix, dtype=self.code_dtype, shape=self.shape, weight_rows=1),
            LayoutPart(
                suffix=self.scale_suffix, dtype=self.scale_dtype, shape=self.scale_shape, weight_rows=weight_rows
            ),
        )

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        codes, scales = parts
        scales = self._scale_rows(_scale_values(scales))
        height = self.block[0] if len(scales) > 1 else codes.shape[0]

        def decode_rows(rows: slice) -> torch.Tensor:
            weight = _code_values(codes[rows])
            if len(scales) == 1:
                weight.mul_(scales)
            else:
                row_scales = scales[rows.start // height : -(-rows.stop // height)]
                if len(weight) % height:
                    weight.mul_(row_scales.repeat_interleave(height, dim=0)[: len(weight)])
                else:
                    weight.view(-1, height, weight.shape[1]).mul_(row_scales.unsqueeze(1))
            return weight.to(self.product_dtype)

        out = torch.empty(codes.shape, dtype=TORCH_DTYPES[self.dtype], device=codes.device)
        return decode_in_pieces(decode_rows, out, row_unit=height if len(scales) > 1 else 1)

    def _scale_rows(self, scales: torch.Tensor) -> torch.Tensor:
        """Return fp32[block rows, 1 or in_features], the scales of each column."""
        if scales.numel() == 1:
            return scales.view(1, 1)
        if scales.ndim == 1:
            return scales.unsqueeze(1)
        columns, width = self.shape[1], self.block[1]
        return scales.repeat_interleave(width, dim=1)[:, :columns] if width < columns else scales


def _scale_values(scales: torch.Tensor) -> torch.Tensor:
    """Return scales in fp32. Bytes are exponents of 2, as `Fp8Dequantize` reads them."""
    return exponents_to_powers(scales, bias=127) if scales.dtype == torch.uint8 else scales.float()


def _code_values(codes: torch.Tensor) -> torch.Tensor:
    """Return the values of FP8 codes in new memory, fp32[rows, columns]."""
    if is_plain_cpu(codes):
        from qlora_dist.cpu.code_tables import fp8_values_cpu

        return fp8_values_cpu(codes)
    return codes.float()


def find_fp8_weights(entries: Mapping[str, TensorEntry], config: Mapping[str, Any], dtype: str) -> PublishedWeights:
    """Find the FP8 weights of a folder, which are those whose type is FP8. `config` may give `weight_block_size`.

    A tensor of three dimensions holds a matrix of every expert, as transformers saves stacked experts. Weights of type
    int8 are FP4, as in the experts of DeepSeek-V4.

    Raises:
        UserError: `weight_block_size` is damaged, or the scales of a weight are missing or have an unsupported type
            or shape.
    """
    method = config.get("quant_method")
    block = config.get("weight_block_size", (1, 32) if method == "mxfp8" else (128, 128))
    if block and not _is_block(block):
        path = next(iter(entries.values())).path.parent / "config.json"
        raise UserError(
            f"{path}: quantization_config.weight_block_size is not two whole numbers above 0; get the file anew"
        )
    weights: dict[str, PublishedWeightEntry] = {}
    tensors = {name for name in entries if name.endswith(INPUT_SCALES)}
    for name, entry in entries.items():
        if entry.dtype not in (*FP8_DTYPES, torch.int8):
            continue
        if method == "fbgemm_fp8" and len(entry.shape) != 2:
            raise UserError(
                f"{entry.path}: {name} holds several experts in the layout of fbgemm, which is not supported; give a "
                "copy of the model in 16 bit"
            )
        scale_name = find_scale_name(entries, name)
        scale = require_tensor(entries, scale_name, name)
        tensors |= {name, scale_name}
        if entry.dtype == torch.int8:
            weights |= make_packed_mxfp4(name, entry, scale_name, scale, dtype)
        else:
            weights |= make_fp8(name, entry, scale_name, scale, block, dtype)
    _check_scales_used(entries, tensors)
    return PublishedWeights(weights=weights, tensors=frozenset(tensors))


def _is_block(block: object) -> bool:
    return isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)


def find_scale_name(entries: Mapping[str, TensorEntry], name: str) -> str:
    """Return the name of a weight's scales, or the usual one if there are none."""
    names = [name + suffix for suffix in _SCALE_SUFFIXES]
    if name.endswith(".weight"):
        names += [name.removesuffix(".weight") + suffix for suffix in _MODULE_SCALES]
    return next((scale for scale in names if scale in entries), names[0])


def make_fp8(
    name: str,
    entry: TensorEntry,
    scale_name: str,
    scale: TensorEntry,
    block: Sequence[int] | None,
    dtype: str,
    *,
    product_dtype: torch.dtype = torch.float32,
) -> dict[str, PublishedWeightEntry]:
    """Return the weights in one tensor of FP8 codes, by name.

    Args:
        name: name of the codes.
        entry: the codes.
        scale_name: name of the scales.
        scale: the scales.
        block: rows and columns of a block; None: the scales divide a matrix evenly.
        dtype: type of the dequantized values.
        product_dtype: type to which they are rounded before.

    Raises:
        UserError: the scales have an unsupported type or shape.
    """
    if scale.dtype not in _FP8_SCALE_DTYPES:
        kind = format_tensor(scale.dtype, scale.shape)
        raise damaged_tensor_error(scale, scale_name, f"is {kind}, which is no type of scales")
    stem_length = len(name.removesuffix(".weight"))
    weights = {}
    for weight_name, parts in each_matrix(name, entry, scale):
        rows, columns = parts[0].shape
        layout = Fp8Layout(
            shape=(rows, columns),
            dtype=dtype,
            code_dtype=entry.dtype,
            scale_dtype=scale.dtype,
            scale_shape=parts[1].shape,
            product_dtype=product_dtype,
            block=_find_block(name, parts[0], parts[1], block),
            code_suffix=name[stem_length:],
            scale_suffix=scale_name[stem_length:],
        )
        weights[weight_name] = PublishedWeightEntry(layout, parts)
    return weights


def _find_block(name: str, entry: TensorEntry, scale: TensorEntry, block: Sequence[int] | None) -> tuple[int, int]:
    """Return rows and columns of the blocks that the scales divide a matrix into.

    Without `block` they divide the matrix evenly, as in `Fp8Dequantize`. So they do where `FP8Experts` of transformers
    makes two rows of scales for a small gate_up_proj.
    """
    rows, columns = entry.shape
    if math.prod(scale.shape) == 1:
        return rows, columns
    if scale.shape in ((rows,), (rows, 1)):
        return 1, columns
    if len(scale.shape) == 2:
        if block and scale.shape == (-(-rows // block[0]), -(-columns // block[1])):
            return block[0], block[1]
        halved = block and rows <= block[0] and scale.shape == (2, -(-columns // block[1]))
        if (halved or not block) and 0 not in scale.shape and rows % scale.shape[0] == columns % scale.shape[1] == 0:
            return rows // scale.shape[0], columns // scale.shape[1]
    blocks = f"blocks of {list(block)}" if block else "equal blocks"
    raise damaged_tensor_error(
        scale,
        name,
        f"has shape {[rows, columns]}, which scales of shape {list(scale.shape)} do not divide into {blocks}",
    )


def _check_scales_used(entries: Mapping[str, TensorEntry], used: set[str]) -> None:
    """Raise if there are block scales whose weight is missing, or is in another type than FP8."""
    for name, entry in entries.items():
        if name.endswith("_scale_inv") and name not in used:
            weight = name.removesuffix("_scale_inv")
            if weight in entries:
                kind = format_tensor(entries[weight].dtype, entries[weight].shape)
                raise damaged_tensor_error(entry, name, f"is there, but {weight} is {kind}")
            raise damaged_tensor_error(entry, name, f"is there, but {weight} is missing")
