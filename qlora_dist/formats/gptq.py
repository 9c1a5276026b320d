"""GPTQ weights: integers of 2, 3, 4 or 8 bits, packed along the columns of the weight and stored transposed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

_GPTQ_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True)
class GptqLayout(PublishedLayout):
    """GPTQ weight: `qweight` [in_features * bits / 32, out_features], scales and zero points for groups of columns.

    The value of a weight is (code - zero point) * scale, computed in the scales' type and rounded to `dtype`. The
    files have no rows of the weight, so it is read and decoded as a whole.

    Source: `dequantize_weight` in gptqmodel's `nn_modules/qlinear/__init__.py`, and `forward` in AutoGPTQ 0.7's
    `qlinear_cuda_old.py` for zero points that are stored minus 1 and wrap around.
    """

    bits: int = 4
    groups: int = 1
    scale_dtype: torch.dtype = torch.float16
    has_group_index: bool = True
    """Whether the folder holds `g_idx`, the group of each column. Else the groups are equal ranges of columns."""
    adds_one_to_zeros: bool = True
    """Whether zero points are stored minus 1, as in all versions of the format but `gptq_v2`."""

    @property
    def parts(self) -> tuple[LayoutPart, ...]:
        rows, columns = self.shape
        shapes: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
            (".qweight", torch.int32, (packed_words(columns, self.bits), rows)),
            (".qzeros", torch.int32, (self.groups, packed_words(rows, self.bits))),
            (".scales", self.scale_dtype, (self.groups, rows)),
        ]
        if self.has_group_index:
            shapes.append((".g_idx", torch.int32, (columns,)))
        return tuple(
            LayoutPart(suffix=suffix, dtype=dtype, shape=shape, weight_rows=0) for suffix, dtype, shape in shapes
        )

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        words, zero_words, scales, *group_index = parts
        zeros = unpack_integers(zero_words, self.bits, self.shape[0]).t()
        if self.adds_one_to_zeros:
            zeros = (zeros + 1) & (2**self.bits - 1)

        def decode_rows(rows: slice) -> torch.Tensor:
            codes = unpack_integers(words[:, rows].t(), self.bits, self.shape[1])
            return apply_scales(codes, scales[:, rows].t(), zeros[rows], *group_index)

        return decode_in_pieces(
            decode_rows, torch.empty(self.shape, dtype=TORCH_DTYPES[self.dtype], device=words.device)
        )


def find_gptq_weights(entries: Mapping[str, TensorEntry], config: Mapping[str, Any], dtype: str) -> PublishedWeights:
    """Find the weights of GPTQ. `config` gives the version and the number of bits.

    Raises:
        UserError: the version or the number of bits is not supported, or tensors of a weight are missing or have other
            shapes.
    """
    version = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if version not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        raise config_error(entries, f"describes GPTQ in the format '{version}', which is arranged for one kernel")
    if config.get("bits") not in _GPTQ_BITS:
        raise config_error(entries, f"describes GPTQ in {config.get('bits')} bit, which is not supported")
    weights = {}
    for name, entry in entries.items():
        stem, _, tensor = name.rpartition(".")
        if tensor == "qweight":
            layout = _find_layout(entries, stem, entry, config)
            layout = replace(layout, dtype=dtype, adds_one_to_zeros=version == "gptq")
            weights[f"{stem}.weight"] = make_integer_entry(entries, stem, layout)
    return collect_weights(entries, weights)


def _find_layout(
    entries: Mapping[str, TensorEntry], stem: str, words: TensorEntry, config: Mapping[str, Any]
) -> GptqLayout:
    length, rows = matrix_shape(words, f"{stem}.qweight")
    scales = require_tensor(entries, f"{stem}.scales", f"{stem}.qweight")
    groups, _ = matrix_shape(scales, f"{stem}.scales")
    bits = config["bits"]
    index = entries.get(f"{stem}.g_idx")
    columns = length * WORD_BITS // bits
    if index is not None and len(index.shape) == 1:
        columns = index.shape[0]
        if config.get("dynamic"):  # modules may have their own number of bits
            bits = next((n for n in _GPTQ_BITS if packed_words(columns, n) == length), bits)
    elif columns % groups:
        raise damaged_tensor_error(scales, f"{stem}.scales", f"has {groups} groups for {columns} columns")
    return GptqLayout(
        shape=(rows, columns),
        bits=bits,
        groups=groups,
        scale_dtype=scale_dtype(scales, f"{stem}.scales"),
        has_group_index=index is not None,
    )
