"""Tensor to byte vector and back, with bitsandbytes' own operators, so that every value is bit-equal to its."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from qlora_dist.compat.bitsandbytes import functional as bnb
from qlora_dist.nf4.code_tables import code_table, nested_code_table
from qlora_dist.nf4.nf4_layout import NESTED_BLOCK_SIZE, NF4Layout, QuantType
from qlora_dist.runtime.threads import parallel_for_each

if TYPE_CHECKING:
    from qlora_dist.cpu.cpu_quantize import CodeBounds

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_LARGEST_KERNEL_BLOCK = 1024  # weights
_CHUNK = 2**19  # weights that one core quantizes at a time, a multiple of every block size


def quantize_weight(
    weight: torch.Tensor, quant_type: QuantType = "nf4", block_size: int = 64, double_quant: bool = True
) -> tuple[torch.Tensor, NF4Layout]:
    """Quantize a weight.

    Args:
        weight: bf16, fp16 or fp32, any shape, on any device.
        quant_type: the code table.
        block_size: weights per absmax.
        double_quant: quantize the absmax values too.

    Returns:
        packed: uint8[layout.total_bytes] on the same device, and its layout.

    Source: `bitsandbytes.functional.quantize_4bit(compress_statistics=double_quant)`, whose bytes these are. On the
    CPU it takes 14 bytes per weight for a moment (12 GB for one matrix of Llama-3.1-405B) and most of its time in a
    binary search: there the codes are ours (`quantize_4bit_cpu`), a chunk at a time, on `torch.get_num_threads()` cores.
    """
    layout = NF4Layout(
        tuple(weight.shape), quant_type, block_size, double_quant, str(weight.dtype).removeprefix("torch.")
    )
    return quantize_chunks([weight.detach().contiguous().view(-1)], layout, weight.device), layout


def quantize_chunks(chunks: Iterable[torch.Tensor], layout: NF4Layout, device: torch.device) -> torch.Tensor:
    """Quantize a weight that is never there as a whole.

    Args:
        chunks: of the flat weight, bf16, fp16 or fp32[n] each, one after the other; each n but the last a multiple of
            the largest block size. A piece may be overwritten once the next is asked for.
        layout: of the weight.
        device: where the work is done.

    Returns:
        packed: uint8[layout.total_bytes] on the device.
    """
    packed = torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device)
    absmax = torch.empty(layout.num_blocks, dtype=torch.float32, device=device)
    done = 0
    for piece in chunks:
        _quantize_chunk(piece.to(device), layout, packed[done // 2 :], absmax[done // layout.block_size :])
        done += piece.numel()
    assert done == layout.numel, f"{done} weights for {layout.shape}"
    if layout.double_quant:
        offset = absmax.mean()
        quantized, nested = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
        packed[layout.absmax] = quantized
        packed[layout.nested_absmax] = nested.absmax.view(torch.uint8)
        packed[layout.offset] = offset.reshape(1).view(torch.uint8)
    else:
        packed[layout.absmax] = absmax.view(torch.uint8)
    return packed


def _quantize_chunk(flat: torch.Tensor, layout: NF4Layout, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    """Fill the first codes and the first absmax values."""
    block_size = layout.block_size

    def quantize_from(start: int) -> None:
        chunk_codes, chunk_absmax = _codes(flat[start : start + chunk], block_size, layout.quant_type)
        codes[start // 2 :][: chunk_codes.numel()] = chunk_codes
        absmax[start // block_size :][: chunk_absmax.numel()] = chunk_absmax

    chunk = _CHUNK if flat.device.type == "cpu" else flat.numel()
    parallel_for_each(quantize_from, range(0, flat.numel(), chunk))


@functools.cache
def _cpu_code_bounds(quant_type: QuantType) -> CodeBounds:
    from qlora_dist.cpu.cpu_quantize import CodeBounds

    return CodeBounds.from_code_table(code_table(quant_type))


def _codes(weights: torch.Tensor, block_size: int, quant_type: QuantType) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8[ceil(n / 2)] and fp32[blocks]. bitsandbytes': off the CPU, for the last block where it is short, and for
    weights that are not finite, whose codes are then its.
    """
    whole = weights.numel() - weights.numel() % block_size if weights.device.type == "cpu" else 0
    if whole:
        from qlora_dist.cpu.cpu_quantize import quantize_4bit_cpu

        codes, absmax = quantize_4bit_cpu(weights[:whole], block_size, _cpu_code_bounds(quant_type))
        if not absmax.isfinite().all():
            whole = 0
    if whole == weights.numel():
        return codes, absmax
    rest, state = bnb.quantize_4bit(weights[whole:], blocksize=block_size, quant_type=quant_type)
    if not whole:
        return rest.flatten(), state.absmax
    return torch.cat([codes, rest.flatten()]), torch.cat([absmax, state.absmax])


def dequantize_weight(packed: torch.Tensor, layout: NF4Layout, dtype: torch.dtype) -> torch.Tensor:
    """The weight that the bytes stand for.

    Args:
        packed: uint8[layout.total_bytes].
        layout: where the parts lie.
        dtype: of the result; values are rounded to layout.dtype first, as bitsandbytes does.

    Returns:
        dtype[layout.shape].

    bitsandbytes 0.50 has three traps on the CPU, and none of them is entered here. Given the matrix's own shape, its
    AVX512 kernel reads the wrong absmax where in_features is a multiple of 16 and not of the block size: the shape
    given is flat, [blocks, block_size], or [numel] (single-threaded) for a matrix that ends within a block. For an
    odd number of weights, and for blocks of 2048 and 4096, it falls back to `torch.compile`, seconds for every new
    shape: the last byte's second code is dequantized too and dropped, and a large block is given as blocks of 1024
    with the same absmax.
    """
    weight = _dequantize_flat(packed[layout.codes], dequantize_absmax(packed, layout), layout)
    return weight[: layout.numel].view(layout.shape).to(dtype)


def dequantize_rows(packed: torch.Tensor, layout: NF4Layout, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of the matrix that the bytes stand for, without the others.

    Args:
        packed: uint8[layout.total_bytes].
        layout: of a matrix whose columns are a multiple of the block size.
        rows: int64[n], their numbers.
        dtype: of the result.

    Returns:
        dtype[n, columns], the values that `dequantize_weight` gives.
    """
    count, columns = layout.shape
    blocks = columns // layout.block_size
    assert blocks * layout.block_size == columns, f"rows of {layout.shape} end within a block of {layout.block_size}"
    codes = packed[layout.codes].view(count, -1)[rows]
    if layout.double_quant:
        nested_absmax = packed[layout.nested_absmax].view(torch.float32)
        block = rows.unsqueeze(1) * blocks + torch.arange(blocks, device=rows.device)
        scale = nested_absmax[block // NESTED_BLOCK_SIZE]
        quantized = packed[layout.absmax].view(count, blocks)[rows]
        absmax = packed[layout.offset].view(torch.float32) + nested_code_table(packed.device)[quantized.int()] * scale
    else:
        absmax = packed[layout.absmax].view(torch.float32).view(count, blocks)[rows]
    return _dequantize_flat(codes.flatten(), absmax.flatten(), layout).view(-1, columns).to(dtype)


def _dequantize_flat(codes: torch.Tensor, absmax: torch.Tensor, layout: NF4Layout) -> torch.Tensor:
    """layout.dtype[2 n] of uint8[n] and fp32[blocks]."""
    block_size, numel = layout.block_size, 2 * codes.numel()
    if block_size > _LARGEST_KERNEL_BLOCK:
        absmax = absmax.repeat_interleave(block_size // _LARGEST_KERNEL_BLOCK)
        block_size = _LARGEST_KERNEL_BLOCK
    flat = (numel // block_size, block_size) if numel % block_size == 0 else (numel,)
    weight: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes, absmax, block_size, layout.quant_type, flat, TORCH_DTYPES[layout.dtype]
    )
    return weight.flatten()


def dequantize_absmax(packed: torch.Tensor, layout: NF4Layout) -> torch.Tensor:
    """fp32[layout.blocks], in full precision."""
    if not layout.double_quant:
        return packed[layout.absmax].view(torch.float32)
    nested_absmax = packed[layout.nested_absmax].view(torch.float32)
    offset = packed[layout.offset].view(torch.float32)
    absmax: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        packed[layout.absmax],
        nested_absmax,
        nested_code_table(packed.device),
        NESTED_BLOCK_SIZE,
        torch.float32,
    )
    return offset + absmax
