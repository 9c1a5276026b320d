"""AWQ weights in the layout of the gemm kernel: integers of 4 bits, packed along the rows of the weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_dist.formats.folder_tensors import PublishedWeights, damaged_tensor_error, require_tensor
from qlora_dist.formats.integer_tensors import (
    collect_weights,
    config_error,
    make_integer_entry,
    matrix_shape,
    scale_dtype,
)
from qlora_dist.formats.packed_integers import WORD_BITS, apply_scales, packed_words, unpack_integers
from qlora_dist.formats.published_layout import LayoutPart, PublishedLayout
from qlora_dist.formats.row_pieces import decode_in_pieces
from qlora_dist.io.safetensors_file import TensorEntry
from qlora_dist.nf4.quantize import TORCH_DTYPES

_AWQ_BITS = 4
_PER_WORD = WORD_BITS // _AWQ_BITS
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word of each of its integers."""


@dataclass(frozen=True, kw_only=True)
class AwqLayout(PublishedLayout):
    """AWQ weight: `qweight` [in_features, out_features / 8], with scales and zero points for groups of columns.

    The value of a weight is (code - zero point) * scale, computed in the scales' type and rounded to `dtype`. The
    files have no rows of the weight, so it is read and decoded as a whole.

    Source: `dequantize_gemm` in AutoAWQ 0.2's `awq/utils/packing_utils.py`.
    """

    groups: int = 1
    scale_dtype: torch.dtype = torch.float16

    @property
    def parts(self) -> tuple[LayoutPart, ...]:
        rows, columns = self.shape
        words = packed_words(rows, _AWQ_BITS)
        return (
            LayoutPart(suffix=".qweight", dtype=torch.int32, shape=(columns, words), weight_rows=0),
            LayoutPart(suffix=".qzeros", dtype=torch.int32, shape=(self.groups, words), weight_rows=0),
            LayoutPart(suffix=".scales", dtype=self.scale_dtype, shape=(self.groups, rows), weight_rows=0),
        )

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        words, zero_words, scales = parts

        def decode_rows(rows: slice) -> torch.Tensor:
            in_words = slice(rows.start // _PER_WORD, rows.stop // _PER_WORD)
            codes, zeros = (_unpack_awq(tensor[:, in_words]) for tensor in (words, zero_words))
            return apply_scales(codes.t(), scales[:, rows].t(), zeros.t())

        out = torch.empty(self.shape, dtype=TORCH_DTYPES[self.dtype], device=words.device)
        return decode_in_pieces(decode_rows, out, row_unit=_PER_WORD)


def _unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """Return the integers of int32[n, words], in the order of the weight's rows: uint8[n, 8 * words]."""
    integers = unpack_integers(words, _AWQ_BITS, _PER_WORD * words.shape[1]).unflatten(1, (-1, _PER_WORD))
    in_order: torch.Tensor = integers[:, :, _PLACES].flatten(1)
    return in_order


def find_awq_weights(entries: Mapping[str, TensorEntry], config: Mapping[str, Any], dtype: str) -> PublishedWeights:
    """Find the weights of AWQ. `config` gives the layout and the number of bits.

    Raises:
        UserError: the layout or the number of bits is not supported, or tensors of a weight are missing or have other
            shapes.
    """
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    bits = config.get("bits", config.get("w_bit", _AWQ_BITS))
    if version != "gemm" or bits != _AWQ_BITS:
        raise config_error(
            entries,
            f"describes AWQ in {bits} bit of the layout '{version}', of which only 4 bit of 'gemm' is supported",
        )
    weights = {}
    for name, entry in entries.items():
        stem, _, tensor = name.rpartition(".")
        if tensor != "qweight":
            continue
        columns, words = matrix_shape(entry, name)
        scales = require_tensor(entries, f"{stem}.scales", name)
        groups, _ = matrix_shape(scales, f"{stem}.scales")
        if columns % groups:
            raise damaged_tensor_error(scales, f"{stem}.scales", f"has {groups} groups for {columns} columns")
        layout = AwqLayout(
            shape=(words * _PER_WORD, columns),
            dtype=dtype,
            groups=groups,
            scale_dtype=scale_dtype(scales, f"{stem}.scales"),
        )
        weights[f"{stem}.weight"] = make_integer_entry(entries, stem, layout)
    return collect_weights(entries, weights)
