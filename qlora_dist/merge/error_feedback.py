"""Rounding of a merged matrix to 4 bit with error feedback, which preserves the update.

An update is hundreds of times smaller than the weights, so plain rounding returns nearly every weight to its old code.
Here each row is rounded from left to right, and later weights compensate the error of earlier ones.

Only the error in the update's input directions is compensated. The update uses only D x of an input x, where D has as
many rows as the update's rank. The remaining error is orthogonal to these directions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qlora_dist.merge.lora_update import LoraUpdate
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quantize import TORCH_DTYPES, code_table, dequantize_absmax

_WEIGHTS_PER_BATCH = 2**22
"""Approximate number of weights in a batch. A step rounds a column, and its overhead equals some thousand weights."""


def update_directions(update: LoraUpdate) -> torch.Tensor:
    """Return D: fp32[r, in_features] with |D x| = |B A x| for every x. It is R A, where B = Q R."""
    r: torch.Tensor = torch.linalg.qr(update.b)[1]
    return r @ update.a


def round_with_feedback(
    packed: torch.Tensor, rows: Iterator[torch.Tensor], layout: NF4Layout, directions: torch.Tensor
) -> torch.Tensor:
    """Round merged rows to 4-bit codes with error feedback, and keep the scales.

    Let e_j be the error of weight j in a row, and s the sum of e_j D_j over the rounded weights. Let l be the mean of
    |D_j|^2. Weight j is rounded from w_j + c, where c = -(s . D_j) / (|D_j|^2 + l) minimizes |s + c D_j|^2 + l c^2.
    This is noise shaping, as in sigma-delta modulation, with a state of r numbers per row.

    Args:
        packed: uint8[layout.total_bytes], the matrix that the update was trained on. The result has the same form.
        rows: chunks of the merged matrix, fp32[n, in_features], in order, each of whole blocks.
        layout: layout of both matrices.
        directions: result of `update_directions`, D: fp32[r, in_features].
    """
    result, absmax = packed.clone(), dequantize_absmax(packed, layout)
    done = 0
    for batch in _batch_rows(rows):
        count = batch.numel()
        codes = _round(batch, _scales(absmax, done, batch, layout), layout, directions).flatten()
        if count % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        result[layout.codes][done // 2 :][: codes.numel() // 2] = codes[0::2] * 16 + codes[1::2]
        done += count
    assert done == layout.numel, f"{done} weights for {layout.shape}"
    return result


def _round(rows: torch.Tensor, scales: torch.Tensor, layout: NF4Layout, directions: torch.Tensor) -> torch.Tensor:
    """Return the codes, uint8[n, in_features]."""
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
    """Yield the rows in larger chunks."""
    batch: list[torch.Tensor] = []
    for chunk in rows:
        batch.append(chunk)
        if sum(chunk.numel() for chunk in batch) >= _WEIGHTS_PER_BATCH:
            yield torch.cat(batch)
            batch = []
    if batch:
        yield torch.cat(batch)


def _scales(absmax: torch.Tensor, first: int, rows: torch.Tensor, layout: NF4Layout) -> torch.Tensor:
    """Return the fp32 scale of each weight of `rows`; `first` is the index of their first weight, a block's start."""
    first_block, size = first // layout.block_size, layout.block_size
    blocks = absmax[first_block : first_block + -(-rows.numel() // size)]
    return blocks.repeat_interleave(size)[: rows.numel()].view(rows.shape)
