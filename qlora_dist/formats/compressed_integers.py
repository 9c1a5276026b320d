"""Integer weights of compressed-tensors: `pack-quantized` (Kimi-K2 and others), `int-quantized`, `naive-quantized`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.compressed_scheme import CompressedScheme, CompressedSchemes
from qlora_dist.formats.folder_tensors import PublishedWeights, damaged_tensor_error, require_tensor
from qlora_dist.formats.integer_tensors import IN_16_BIT, collect_weights, make_integer_entry, matrix_shape, scale_dtype
from qlora_dist.formats.packed_integers import WORD_BITS, apply_scales, packed_words, unpack_integers
from qlora_dist.formats.published_layout import LayoutPart, PublishedLayout
from qlora_dist.formats.row_pieces import decode_in_pieces
from qlora_dist.io.safetensors_file import TensorEntry
from qlora_dist.nf4.quantize import TORCH_DTYPES

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_ACTIVATION_SUFFIXES = tuple(
    f".{what}_{kind}" for what in ("input", "output", "q", "k", "v") for kind in ("scale", "zero_point", "global_scale")
)
"""Ends of the names of tensors that quantize activations, or the cache of keys and values."""


@dataclass(frozen=True, kw_only=True)
class CompressedIntegerLayout(PublishedLayout):
    """Integers of up to 8 bits with a scale for each group of columns, each row, or the whole weight.

    The value of a weight is (code - zero point) * scale, computed in the scales' type and rounded to `dtype`.

    Source: `compressed_tensors.compressors.PackedQuantizationCompressor.decompress`, and
    `NaiveQuantizationCompressor.decompress` for codes that are not packed.
    """

    bits: int = 4
    is_packed: bool = True
    """Whether the codes are packed along the columns, in `weight_packed`. Else `weight` is int8."""
    scale_dtype: torch.dtype = torch.bfloat16
    scale_shape: tuple[int, ...] = ()
    """Shape of the scales: [out_features, groups], or any shape of one element."""
    zero_dtype: torch.dtype | None = None
    """Type of the zero points, which have the shape of the scales; None: all are 0."""
    is_zero_packed: bool = False
    """Whether the zero points are packed along the rows, as int32."""
    has_group_index: bool = False
    """Whether the folder says for each column which group it belongs to (`actorder: group` of older releases)."""

    @property
    def parts(self) -> tuple[LayoutPart, ...]:
        rows, columns = self.shape
        rows_per_zero = WORD_BITS // self.bits if self.is_zero_packed else 1
        # rows of zero points of 3 bits cross the borders of words, so such a weight is decoded as a whole
        weight_rows = 0 if self.is_zero_packed and WORD_BITS % self.bits else 1
        per_row = 0 if self._has_one_scale else weight_rows
        code_shape = (rows, packed_words(columns, self.bits)) if self.is_packed else (rows, columns)
        parts = [
            LayoutPart(
                suffix=".weight_packed" if self.is_packed else ".weight",
                dtype=torch.int32 if self.is_packed else torch.int8,
                shape=code_shape,
                weight_rows=weight_rows,
            ),
            LayoutPart(suffix=".weight_scale", dtype=self.scale_dtype, shape=self.scale_shape, weight_rows=per_row),
        ]
        if self.zero_dtype is not None:
            shape = (packed_words(rows, self.bits), *self.scale_shape[1:]) if self.is_zero_packed else self.scale_shape
            zero_rows = rows_per_zero if per_row else 0
            parts.append(
                LayoutPart(suffix=".weight_zero_point", dtype=self.zero_dtype, shape=shape, weight_rows=zero_rows)
            )
        if self.has_group_index:
            parts.append(LayoutPart(suffix=".weight_g_idx", dtype=torch.int32, shape=self.shape[1:], weight_rows=0))
        return tuple(parts)

    @property
    def _has_one_scale(self) -> bool:
        return math.prod(self.scale_shape) == 1

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        codes, scales, *rest = parts
        zeros = rest.pop(0) if self.zero_dtype is not None else None
        group_index = self._group_index(rest[0]) if self.has_group_index else None
        if zeros is not None and self.is_zero_packed:
            zeros = self._unpack(zeros.t(), len(codes)).t()
        if self._has_one_scale:
            scales = scales.view(1, 1)
            zeros = zeros.view(1, 1) if zeros is not None else None

        def decode_rows(rows: slice) -> torch.Tensor:
            values = self._unpack(codes[rows], self.shape[1]) if self.is_packed else codes[rows]
            scale_rows = slice(None) if self._has_one_scale else rows
            return apply_scales(
                values, scales[scale_rows], zeros[scale_rows] if zeros is not None else None, group_index
            )

        out = torch.empty(len(codes), self.shape[1], dtype=TORCH_DTYPES[self.dtype], device=codes.device)
        return decode_in_pieces(decode_rows, out)

    def _unpack(self, words: torch.Tensor, count: int) -> torch.Tensor:
        """Return int8[rows, count]. Signed integers are packed after 2 ** (bits - 1) is added."""
        # uint8 wraps around, so its bytes are right for int8
        codes: torch.Tensor = unpack_integers(words, self.bits, count) - 2 ** (self.bits - 1)
        return codes.view(torch.int8)

    def _group_index(self, index: torch.Tensor) -> torch.Tensor:
        """Return the group of each column; where -1 is stored, groups are equal ranges of columns."""
        columns = self.shape[1]
        ranges = torch.arange(columns, dtype=torch.int32, device=index.device) // (columns // self.scale_shape[-1])
        return torch.where((index >= 0).all(), index, ranges)


def find_compressed_integers(
    entries: Mapping[str, TensorEntry], config: Mapping[str, Any], dtype: str
) -> PublishedWeights:
    """Find the integer weights of compressed-tensors. Weights whose group has another type are left out.

    Raises:
        UserError: a scheme is not supported, or tensors of a weight are missing or have other shapes.
    """
    schemes = CompressedSchemes(config, next(iter(entries.values())).path.parent / "config.json")
    weights = {}
    for name, entry in entries.items():
        stem, _, tensor = name.rpartition(".")
        if tensor != "weight_packed" and not (tensor == "weight" and entry.dtype == torch.int8):
            continue
        scheme = schemes.find(stem)
        if scheme is None:
            raise damaged_tensor_error(entry, name, "belongs to no group of quantization_config in config.json")
        if scheme.type == "int":
            layout = replace(_find_layout(entries, stem, name, scheme), dtype=dtype)
            weights[f"{stem}.weight"] = make_integer_entry(entries, stem, layout)
    others = {name + end for name in weights for end in ("_shape", "_g_idx")}
    others |= {name for name in entries if name.endswith(_ACTIVATION_SUFFIXES)}
    return collect_weights(entries, weights, others)


def _find_layout(
    entries: Mapping[str, TensorEntry], stem: str, name: str, scheme: CompressedScheme
) -> CompressedIntegerLayout:
    """Return the layout of a weight. `name` is that of its codes."""
    codes, is_packed = entries[name], scheme.format == "pack-quantized"
    if scheme.format not in _FORMATS or is_packed != name.endswith("_packed") or not 1 <= scheme.bits <= 8:
        raise UserError(
            f"{codes.path}: {name} is in {scheme.bits} bit of the format '{scheme.format}', which is not supported; "
            f"{IN_16_BIT}"
        )
    scale_name, zero_name = f"{stem}.weight_scale", f"{stem}.weight_zero_point"
    scale = require_tensor(entries, scale_name, name)
    zero = entries.get(zero_name) if scheme.is_symmetric else require_tensor(entries, zero_name, name)
    rows, columns = matrix_shape(codes, name)
    if is_packed:
        columns = columns * WORD_BITS // scheme.bits
    if scheme.strategy == "group" and scheme.group_size:
        if is_packed:  # the number of words gives the columns within a word only
            columns = matrix_shape(scale, scale_name)[1] * scheme.group_size
        if columns % scheme.group_size:
            raise damaged_tensor_error(codes, name, f"has {columns} columns in groups of {scheme.group_size}")
        scale_shape: tuple[int, ...] = (rows, columns // scheme.group_size)
    elif scheme.strategy == "channel":
        scale_shape = (rows, 1)
    elif scheme.strategy == "tensor":
        scale_shape = scale.shape if math.prod(scale.shape) == 1 else (1,)
    else:
        raise UserError(
            f"{codes.path}: {name} has scales of the strategy '{scheme.strategy}', which is not supported for "
            f"integers; {IN_16_BIT}"
        )
    is_zero_packed = is_packed and not scheme.is_symmetric and scheme.strategy != "tensor"
    return CompressedIntegerLayout(
        shape=(rows, columns),
        bits=scheme.bits,
        is_packed=is_packed,
        scale_dtype=scale_dtype(scale, scale_name),
        scale_shape=scale_shape,
        zero_dtype=None if zero is None else torch.int32 if is_zero_packed else zero.dtype,
        is_zero_packed=is_zero_packed,
        has_group_index=scheme.strategy == "group" and f"{stem}.weight_g_idx" in entries,
    )
