"""A merged matrix in 4 bit again, without losing the update in the rounding.

An update is hundreds of times smaller than the weights, so nearly every weight that it has moved is nearest to the code
that it had: rounding gives back the base. Here every row is rounded from left to right, and what has been lost so far
is made good by the weights to come. What counts as lost is what the update would have seen: of an input x it uses D x
only, where D has as many rows as its rank. The error that is left lies across these directions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qlora_dist.merge.lora_update import LoraUpdate
from qlora_dist.nf4.code_tables import code_table
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quantize import TORCH_DTYPES, dequantize_absmax

_WEIGHTS_PER_BATCH = 2**22
"""At a time, about: a step is a column of them, and costs as much to begin as some thousand weights."""


def update_directions(update: LoraUpdate) -> torch.Tensor:
    """D: fp32[r, in_features] with |D x| = |B A x| for every x: R A, where B = Q R."""
    r: torch.Tensor = torch.linalg.qr(update.b)[1]
    return r @ update.a


def round_with_feedback(
    packed: torch.Tensor, rows: Iterator[torch.Tensor], layout: NF4Layout, directions: torch.Tensor
) -> torch.Tensor:
    """Other codes for the same scales.

    Args:
        packed: uint8[layout.total_bytes], what the update was trained on.
        rows: fp32[n, in_features] each, what it became, from the first row on, in pieces of whole blocks.
        layout: of both.
        directions: fp32[r, in_features], D.

    Returns:
        uint8[layout.total_bytes].

    With e_j the error of weight j in a row, s = sum of e_j D_j over what is rounded, and l the mean of |D_j|^2: weight
    j is rounded from w_j + c, where c = -(s . D_j) / (|D_j|^2 + l) has the least |s + c D_j|^2 + l c^2. It is noise
    shaping, as in sigma-delta modulation, with a state of r numbers for each row.
    """
    result, absmax = packed.clone(), dequantize_absmax(packed, layout)
    done = 0
    for piece in _batch_rows(rows):
        count = piece.numel()
        codes = _round(piece, _scales(absmax, done, piece, layout), layout, directions).flatten()
        if count % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        result[layout.codes][done // 2 :][: codes.numel() // 2] = codes[0::2] * 16 + codes[1::2]
        done += count
    assert done == layout.numel, f"{done} weights for {layout.shape}"
    return result


def _round(rows: torch.Tensor, scales: torch.Tensor, layout: NF4Layout, directions: torch.Tensor) -> torch.Tensor:
    """Codes, uint8[n, in_features]."""
    values, order = code_table(layout.quant_type).sort()
    bounds = (values[1:] + values[:-1]) / 2
    dtype = TORCH_DTYPES[layout.dtype]
    targets, scales, columns = rows.T.contiguous(), scales.T.contiguous(), directions.T.contiguous()
    squares = directions.square().sum(dim=0)
    damping = (squares + squares.mean()).clamp_min(torch.finfo(torch.float32).tiny).tolist()
    accumulated_error = torch.zeros(len(rows), len(directions))
    codes = torch.empty(targets.shape, dtype=torch.uint8)
    for j, column in enumerate(columns):
        corrected = torch.addmv(targets[j], accumulated_error, column, alpha=-1 / damping[j])
        code = torch.bucketize(corrected / scales[j], bounds)
        stored = (values[code] * scales[j]).to(dtype).float()
        accumulated_error.addr_(stored - targets[j], column)
        codes[j] = code
    return order.to(torch.uint8)[codes.T.int()]


def _batch_rows(rows: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same in larger pieces."""
    batch: list[torch.Tensor] = []
    for piece in rows:
        batch.append(piece)
        if sum(one.numel() for one in batch) >= _WEIGHTS_PER_BATCH:
            yield torch.cat(batch)
            batch = []
    if batch:
        yield torch.cat(batch)


def _scales(absmax: torch.Tensor, first: int, rows: torch.Tensor, layout: NF4Layout) -> torch.Tensor:
    """fp32, of the shape of the rows, whose first weight is the `first` of the matrix, where a block begins."""
    begin, size = first // layout.block_size, layout.block_size
    blocks = absmax[begin : begin + -(-rows.numel() // size)]
    return blocks.repeat_interleave(size)[: rows.numel()].view(rows.shape)
