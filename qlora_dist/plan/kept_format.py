"""Bytes of weights that keep their published format (`model.keep_format`), from config.json alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_dist.errors import UserError
from qlora_dist.runtime.byte_sizes import align_bytes

BYTES_16_BIT = 2


@dataclass(frozen=True, kw_only=True)
class KeptFormat:
    """Published format of a model's linear layers. Other linear layers are byte vectors of 16-bit values."""

    code_bits: int
    scale_bytes: int
    block: tuple[int | None, int | None]
    """Rows and columns that share a scale; None: all of them."""
    excluded: tuple[str, ...] = ()
    """Patterns of the modules in 16 bit, as in `quantization_config`."""
    is_for_experts_only: bool = False

    def covers(self, module: str) -> bool:
        """Return whether a module's weight is in the format, given its full name."""
        if self.is_for_experts_only:
            return ".experts." in module
        return not any(_matches(pattern, module) for pattern in self.excluded)

    def vector_bytes(self, rows: int, columns: int, *, covered: bool = True) -> int:
        """Return the bytes of a matrix's vector, in the format or in 16 bit."""
        if not covered:
            return align_bytes(BYTES_16_BIT * rows * columns)
        block_rows, block_columns = self.block
        scales = -(-rows // (block_rows or rows)) * -(-columns // (block_columns or columns))
        return align_bytes(rows * columns * self.code_bits // 8) + align_bytes(self.scale_bytes * scales)


def read_kept_format(config: Mapping[str, Any]) -> KeptFormat:
    """Return the format that config.json describes.

    Raises:
        UserError: the planner does not know the format.
    """
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    excluded = tuple(quantization.get("modules_to_not_convert") or ())
    if method == "fp8" and (block := quantization.get("weight_block_size")):
        return KeptFormat(code_bits=8, scale_bytes=4, block=(block[0], block[1]), excluded=excluded)
    if method == "fbgemm_fp8":
        return KeptFormat(code_bits=8, scale_bytes=4, block=(1, None), excluded=excluded)
    if method == "mxfp4":
        return KeptFormat(code_bits=4, scale_bytes=1, block=(1, 32), is_for_experts_only=True)
    groups = list((quantization.get("config_groups") or {}).values())
    if method == "compressed-tensors" and len(groups) == 1:
        weights, excluded = groups[0].get("weights") or {}, tuple(quantization.get("ignore") or ())
        columns = {"group": weights.get("group_size"), "channel": None}
        bits, strategy = weights.get("num_bits"), weights.get("strategy")
        if bits in (4, 8) and strategy in columns and weights.get("symmetric", True) and weights.get("type") != "float":
            return KeptFormat(code_bits=bits, scale_bytes=BYTES_16_BIT, block=(1, columns[strategy]), excluded=excluded)
    raise UserError(f"model.keep_format: the planner does not know the sizes of weights in the format {method}")


def _matches(pattern: str, module: str) -> bool:
    """Return whether a pattern of transformers, or with `re:` of compressed-tensors, names a module."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return re.match(rf"(?:{pattern}){boundary}", module) is not None or module.endswith(pattern)
