"""MXFP4 weights: FP4 codes and a power of two for every 32 weights of a row (gpt-oss, DeepSeek-V4's experts)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.folder_tensors import (
    PublishedWeights,
    check_tensor,
    damaged_tensor_error,
    each_matrix,
    require_tensor,
    slice_expert,
)
from qlora_dist.formats.fp4 import FP4_VALUES, fp4_values
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.formats.published_layout import LayoutPart, PublishedLayout
from qlora_dist.formats.row_pieces import decode_in_pieces
from qlora_dist.io.safetensors_file import TensorEntry
from qlora_dist.nf4.quant_state import expert_key
from qlora_dist.nf4.quantize import TORCH_DTYPES

MXFP4_GROUP = 32
"""Weights of a row that share a scale."""
_MXFP4_SCALE_DTYPES = (torch.uint8, torch.float8_e8m0fnu, torch.float32)
_DOUBLED = tuple(2 * value for value in FP4_VALUES)


@dataclass(frozen=True, kw_only=True)
class Mxfp4Layout(PublishedLayout):
    """Codes in FP4, two in a byte, the low half first, and an exponent of 2 for every 32 weights of a row.

    The value of a weight is code * 2**(exponent - 127), rounded to `dtype`.

    Source: `transformers.integrations.mxfp4.convert_moe_packed_tensors`, before it transposes the matrices.
    """

    code_shape: tuple[int, ...]
    """[out_features, in_features / 32, 16], or [out_features, in_features / 2]."""
    code_dtype: torch.dtype = torch.uint8
    code_suffix: str = "_blocks"
    scale_dtype: torch.dtype = torch.uint8
    """uint8; float8_e8m0fnu, whose 255 is not a number; or float32, which holds the power itself."""
    scale_suffix: str = "_scales"

    @property
    def parts(self) -> tuple[LayoutPart, ...]:
        groups = self.shape[0], self.shape[1] // MXFP4_GROUP
        return (
            LayoutPart(suffix=self.code_suffix, dtype=self.code_dtype, shape=self.code_shape, weight_rows=1),
            LayoutPart(suffix=self.scale_suffix, dtype=self.scale_dtype, shape=groups, weight_rows=1),
        )

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        codes, scales = parts
        dtype = TORCH_DTYPES[self.dtype]
        # bf16 holds a code and a power of two exactly, and their product is rounded once, as that of fp32 values.
        exact = dtype == torch.bfloat16 and scales.dtype.itemsize == 1
        computed = torch.bfloat16 if exact else torch.float32

        def decode_rows(rows: slice) -> torch.Tensor:
            groups = fp4_values(codes[rows], _DOUBLED).to(computed).view(-1, scales.shape[1], MXFP4_GROUP)
            groups.mul_(_half_scales(scales[rows]).to(computed).unsqueeze(-1))
            return groups.view(-1, self.shape[1])

        out = torch.empty(len(codes), self.shape[1], dtype=dtype, device=codes.device)
        return decode_in_pieces(decode_rows, out)


def _half_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return half of each scale in fp32, because 2**(255 - 127) is infinite."""
    return exponents_to_powers(scales, bias=128) if scales.dtype == torch.uint8 else scales.float().mul_(0.5)


@functools.cache
def _power_table(bias: int, device: torch.device) -> torch.Tensor:
    """Return fp32[256], the power of two of each exponent in a byte."""
    return torch.ldexp(torch.ones(256), torch.arange(256) - bias).to(device)


def exponents_to_powers(exponents: torch.Tensor, bias: int) -> torch.Tensor:
    """Return 2**(exponent - bias) in fp32 for uint8 of any shape, exactly on every device, as `exp2` need not be."""
    table = _power_table(bias, exponents.device)
    return table.index_select(0, exponents.reshape(-1).int()).view(exponents.shape)


def find_mxfp4_weights(entries: Mapping[str, TensorEntry], config: Mapping[str, Any], dtype: str) -> PublishedWeights:
    """Find the MXFP4 weights of a folder as OpenAI publishes gpt-oss: X_blocks and X_scales of all experts.

    The matrices of the experts are [out_features, in_features], the transpose of those in transformers' class.

    Raises:
        UserError: the scales of a weight are missing, or tensors have an unsupported type or shape.
    """
    del config
    weights: dict[str, PublishedWeightEntry] = {}
    tensors: set[str] = set()
    for name, entry in entries.items():
        stem = name.removesuffix("_blocks")
        if stem == name:
            _check_scales_have_blocks(entries, name)
            continue
        if entry.dtype.is_floating_point:
            raise UserError(
                f"{entry.path}: {name} is not in MXFP4; transformers saves a dequantized model so, but cannot load it; "
                "give the folder from which the model was loaded, or a copy of the model in bf16"
            )
        scale_name = f"{stem}_scales"
        scale = require_tensor(entries, scale_name, name)
        if len(entry.shape) != 4:
            raise damaged_tensor_error(entry, name, f"has shape {list(entry.shape)}, not [experts, rows, groups, 16]")
        check_tensor(entry, name, torch.uint8, (*entry.shape[:3], MXFP4_GROUP // 2))
        check_tensor(scale, scale_name, torch.uint8, entry.shape[:3])
        tensors |= {name, scale_name}
        experts, rows, groups, _ = entry.shape
        layout = Mxfp4Layout(shape=(rows, groups * MXFP4_GROUP), dtype=dtype, code_shape=entry.shape[1:])
        for expert in range(experts):
            parts = slice_expert(entry, expert), slice_expert(scale, expert)
            weights[expert_key(stem, expert)] = PublishedWeightEntry(layout, parts)
    return PublishedWeights(weights=weights, tensors=frozenset(tensors))


def make_packed_mxfp4(
    name: str, entry: TensorEntry, scale_name: str, scale: TensorEntry, dtype: str
) -> dict[str, PublishedWeightEntry]:
    """Return the weights in one tensor of codes, uint8 or int8[..., in_features / 2], by name.

    DeepSeek-V4 stores experts so, and compressed-tensors all weights. `name` and `entry` are the codes.

    Raises:
        UserError: the scales have an unsupported type or shape.
    """
    stem = name.removesuffix(".weight").removesuffix(".weight_packed")
    weight_name = name.removesuffix("_packed")
    weights = {}
    for matrix, (codes, scales) in each_matrix(weight_name, entry, scale):
        rows, half = codes.shape
        kind = scale.dtype if scale.dtype in _MXFP4_SCALE_DTYPES else torch.uint8
        check_tensor(scales, scale_name, kind, (rows, 2 * half // MXFP4_GROUP))
        if 2 * half % MXFP4_GROUP:
            raise damaged_tensor_error(entry, name, f"has {2 * half} columns in groups of {MXFP4_GROUP}")
        layout = Mxfp4Layout(
            shape=(rows, 2 * half),
            dtype=dtype,
            code_shape=codes.shape,
            code_dtype=entry.dtype,
            code_suffix=name[len(stem) :],
            scale_dtype=scale.dtype,
            scale_suffix=scale_name[len(stem) :],
        )
        weights[matrix] = PublishedWeightEntry(layout, (codes, scales))
    return weights


def _check_scales_have_blocks(entries: Mapping[str, TensorEntry], name: str) -> None:
    """Raise if these are scales in MXFP4 whose codes are missing."""
    stem = name.removesuffix("_scales")
    if stem != name and f"{stem}_blocks" not in entries:
        raise damaged_tensor_error(entries[name], name, f"is there, but {stem}_blocks is missing")
