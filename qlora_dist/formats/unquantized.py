"""Weights in 16 or 32 bit beside others in a published format, handled as byte vectors like those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.formats.published_layout import LayoutPart, PublishedLayout
from qlora_dist.io.safetensors_file import TensorEntry
from qlora_dist.nf4.quantize import TORCH_DTYPES


@dataclass(frozen=True, kw_only=True)
class UnquantizedLayout(PublishedLayout):
    """Values in `dtype`, [out_features, in_features], without scales."""

    @property
    def parts(self) -> tuple[LayoutPart, ...]:
        return (LayoutPart(suffix=".weight", dtype=TORCH_DTYPES[self.dtype], shape=self.shape, weight_rows=1),)

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return parts[0]


def unquantized_weight(entry: TensorEntry) -> PublishedWeightEntry:
    """Return a matrix in 16 or 32 bit as a weight whose bytes can be sharded like other weights."""
    rows, columns = entry.shape
    layout = UnquantizedLayout(shape=(rows, columns), dtype=str(entry.dtype).removeprefix("torch."))
    return PublishedWeightEntry(layout, (entry,))
