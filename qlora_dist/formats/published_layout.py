"""Layout of a weight in a published format: the tensors of which it consists, and their place in a byte vector."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from qlora_dist.runtime.byte_sizes import align_bytes


@dataclass(frozen=True, kw_only=True)
class LayoutPart:
    """Tensor that belongs to a weight, such as its codes or its scales."""

    suffix: str
    """End of the tensor's name in a folder, after the stem that all parts of the weight share."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    weight_rows: int
    """Number of rows of the weight that one row of this tensor describes; 0: every chunk of rows needs all of it."""

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class PublishedLayout(ABC):
    """Layout of a weight in a published format.

    The bytes of the parts lie one after the other in `packed: uint8[total_bytes]`. Each part starts at a multiple of 16
    bytes. Equal layouts of several matrices are interchangeable.
    """

    shape: tuple[int, int]
    """Shape of the weight, [out_features, in_features]."""
    dtype: str = "bfloat16"
    """Type of the dequantized values ('bfloat16', 'float16', 'float32'), before they are cast to the compute type."""

    @property
    @abstractmethod
    def parts(self) -> tuple[LayoutPart, ...]:
        """Tensors of the weight, in the order of their bytes in the vector."""

    @abstractmethod
    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the dequantized rows, [rows, in_features] in the type `dtype`.

        Args:
            parts: the tensors of `parts`, in their order. A tensor with `weight_rows` holds only its rows for the
                requested rows of the weight, which begin at a multiple of `row_unit`.
        """

    @cached_property
    def row_unit(self) -> int:
        """Number of rows that can be decoded without the others; all rows if the codes are not split by rows."""
        if self.parts[0].weight_rows == 0:
            return self.shape[0]
        return min(self.shape[0], math.lcm(*(part.weight_rows for part in self.parts if part.weight_rows)))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """Range of each part's bytes in the vector."""
        spans, start = [], 0
        for part in self.parts:
            spans.append(slice(start, start + part.nbytes))
            start = align_bytes(start + part.nbytes)
        return tuple(spans)

    @cached_property
    def total_bytes(self) -> int:
        return align_bytes(self.spans[-1].stop)

    def part_rows(self, part: LayoutPart, first: int, stop: int) -> slice:
        """Return the rows of a part that describe the rows first .. stop of the weight."""
        if part.weight_rows == 0:
            return slice(0, part.shape[0] if part.shape else 1)
        return slice(first // part.weight_rows, -(-stop // part.weight_rows))

    def dequantize(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight that `packed: uint8[total_bytes]` encodes, dtype[out_features, in_features]."""
        parts = [
            packed[span].view(part.dtype).view(part.shape) for part, span in zip(self.parts, self.spans, strict=True)
        ]
        return self.decode(parts).to(dtype)
