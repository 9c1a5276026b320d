"""Weights in 8 bit of bitsandbytes (LLM.int8()): one scale for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_dist.compat.bitsandbytes import functional as bnb
from qlora_dist.errors import UserError
from qlora_dist.formats.folder_tensors import PublishedWeights
from qlora_dist.formats.integer_tensors import IN_16_BIT, collect_weights, make_integer_entry, matrix_shape
from qlora_dist.formats.published_layout import LayoutPart, PublishedLayout
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry
from qlora_dist.nf4.quantize import TORCH_DTYPES


@dataclass(frozen=True, kw_only=True)
class BnbInt8Layout(PublishedLayout):
    """Codes int8[out_features, in_features], and the largest absolute value of each row, which stands for 127.

    The value of a weight is code * SCB / 127, as `bitsandbytes.functional.int8_vectorwise_dequant` gives it in fp32,
    rounded to `dtype`.
    """

    @property
    def parts(self) -> tuple[LayoutPart, ...]:
        return (
            LayoutPart(suffix=".weight", dtype=torch.int8, shape=self.shape, weight_rows=1),
            LayoutPart(suffix=".SCB", dtype=torch.float32, shape=self.shape[:1], weight_rows=1),
        )

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        codes, scales = parts
        weight: torch.Tensor = bnb.int8_vectorwise_dequant(codes, scales)
        return weight.to(TORCH_DTYPES[self.dtype])


def find_bnb_int8_weights(
    entries: Mapping[str, TensorEntry], config: Mapping[str, Any], dtype: str
) -> PublishedWeights:
    """Find the weights in 8 bit of bitsandbytes: those whose type is int8. A folder in 4 bit may have some too.

    Raises:
        UserError: tensors of a weight are missing, have other shapes, or are arranged for an old kernel.
    """
    weights, orders = {}, set()
    with SafetensorsReader() as reader:
        for name, entry in entries.items():
            stem, _, tensor = name.rpartition(".")
            if tensor != "weight" or entry.dtype != torch.int8:
                continue
            weights[name] = make_integer_entry(
                entries, stem, BnbInt8Layout(shape=matrix_shape(entry, name), dtype=dtype)
            )
            order_name = f"{stem}.weight_format"
            if order_name not in entries:
                continue
            orders.add(order_name)
            if reader.read(entries[order_name]).any():  # 0 means rows; older releases of bitsandbytes had others
                raise UserError(
                    f"{entry.path}: {name} is arranged for an old kernel of bitsandbytes, which is not supported; "
                    f"{IN_16_BIT}"
                )
    return collect_weights(entries, weights, orders)
