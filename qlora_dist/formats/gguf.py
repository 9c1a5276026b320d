"""Weights in the formats of GGUF files, such as Q4_K: rows of blocks that hold codes and their scales."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.formats.published_layout import LayoutPart, PublishedLayout
from qlora_dist.formats.row_pieces import decode_in_pieces
from qlora_dist.io.gguf_file import GGUF_FLOATS, GgufTensor
from qlora_dist.nf4.quantize import TORCH_DTYPES


@dataclass(frozen=True, kw_only=True)
class GgufLayout(PublishedLayout):
    """Rows of blocks of a ggml type, uint8[out_features, row bytes], or rows of plain numbers.

    The values are computed in fp32, as `gguf.quants.dequantize` does, and rounded to `dtype`.
    """

    ggml_type: str = "Q4_K"
    head_rows: int = 0
    """Rows of a head whose halves llama.cpp has interleaved, as in Llama's projections of queries and keys; 0: the rows
    have transformers' order."""

    @property
    def parts(self) -> tuple[LayoutPart, ...]:
        import gguf

        rows, columns = self.shape
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.ggml_type]]
        unit = self.head_rows or 1
        shape = (rows // unit, unit * columns // block * block_bytes)
        return (LayoutPart(suffix=".weight", dtype=torch.uint8, shape=shape, weight_rows=unit),)

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        unit = self.head_rows or 1
        blocks = parts[0]

        def decode_rows(rows: slice) -> torch.Tensor:
            units = blocks[rows.start // unit : rows.stop // unit]
            if self.head_rows:
                units = units.unflatten(1, (unit // 2, 2, -1)).transpose(1, 2).contiguous()
            return ggml_values(units.reshape(-1), self.ggml_type).view(-1, self.shape[1])

        out = torch.empty(len(blocks) * unit, self.shape[1], dtype=TORCH_DTYPES[self.dtype], device=blocks.device)
        return decode_in_pieces(decode_rows, out, row_unit=unit)


def ggml_values(data: torch.Tensor, ggml_type: str) -> torch.Tensor:
    """Return the values of blocks, uint8[bytes] -> float32[values], on the same device.

    transformers decodes most types with torch, and the package `gguf` decodes the others on the CPU.

    Raises:
        NotImplementedError: neither decodes this type.
    """
    if ggml_type in GGUF_FLOATS:
        return data.view(GGUF_FLOATS[ggml_type]).float()
    import gguf

    number = gguf.GGMLQuantizationType[ggml_type]
    if importlib.util.find_spec("transformers.integrations.gguf") is not None:  # transformers 5.23 has it
        from transformers.integrations.gguf import dequant

        if number in dequant.GGML_BLOCK:
            values: torch.Tensor = dequant.dequantize(data, int(number), torch.float32)
            return values
    block_bytes = gguf.GGML_QUANT_SIZES[number][1]
    blocks = data.cpu().view(-1, block_bytes).numpy()
    return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(blocks, number))).view(-1).to(data.device)


def check_ggml_type(tensor: GgufTensor, name: str) -> None:
    """Check that the values of a tensor can be computed.

    Raises:
        UserError: its type has none, or an unsupported one.
    """
    block_bytes = tensor.entry.shape[-1] * tensor.entry.dtype.itemsize
    try:
        ggml_values(torch.zeros(block_bytes, dtype=torch.uint8), tensor.ggml_type)
    except NotImplementedError:
        raise UserError(
            f"{tensor.entry.path}: {name} is in {tensor.ggml_type}, which is not supported; give a file of another type"
        ) from None


def gguf_weight(tensor: GgufTensor, dtype: str, *, head_rows: int = 0) -> PublishedWeightEntry:
    """Return a matrix of a GGUF file whose values have the type `dtype`, with `head_rows` as in `GgufLayout`."""
    rows, columns = tensor.shape
    layout = GgufLayout(shape=(rows, columns), dtype=dtype, ggml_type=tensor.ggml_type, head_rows=head_rows)
    assert layout.parts[0].nbytes == math.prod(tensor.entry.shape) * tensor.entry.dtype.itemsize, "of its type"
    return PublishedWeightEntry(layout, (tensor.entry,))
