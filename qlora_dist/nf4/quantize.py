"""Quantization to byte vectors and dequantization, with values that are bit-equal to bitsandbytes'."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from qlora_dist.compat.bitsandbytes import functional as bnb
from qlora_dist.nf4.nf4_layout import NESTED_BLOCK_SIZE, NF4Layout, QuantType
from qlora_dist.runtime.threads import parallel_for_each

if TYPE_CHECKING:
    from qlora_dist.cpu.cpu_quantize import CodeBounds

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_LARGEST_KERNEL_BLOCK = 1024  # weights
_WEIGHTS_PER_CORE = 2**19  # weights that one core quantizes at a time: a multiple of every block size


@functools.cache
def nested_code_table(device: torch.device) -> torch.Tensor:
    """Return fp32[256], the values of the 8-bit codes of double quantization.

    Do not call it in a module's constructor. DeepSpeed's `zero.Init` casts every float tensor that is created under
    it, and a bf16 table read as fp32 gives NaN without an error.
    """
    table: torch.Tensor = bnb.create_dynamic_map()
    return table.to(device)


@functools.cache
def code_table(quant_type: QuantType) -> torch.Tensor:
    """Return fp32[16] on the CPU, the values of the 4-bit codes."""
    # bitsandbytes' default device is "cuda"
    table: torch.Tensor = bnb.get_4bit_type(quant_type, device="cpu")
    return table


def quantize_weight(
    weight: torch.Tensor, quant_type: QuantType = "nf4", block_size: int = 64, *, double_quant: bool = True
) -> tuple[torch.Tensor, NF4Layout]:
    """Quantize a weight, bf16, fp16 or fp32 of any shape, and return uint8[layout.total_bytes] and its layout.

    The bytes equal the result of `bitsandbytes.functional.quantize_4bit(compress_statistics=double_quant)`. On the CPU
    that needs 14 bytes per weight, 12 GB for one matrix of Llama-3.1-405B, and most time for a binary search. So
    `quantize_4bit_cpu` computes the codes there, a chunk at a time, on `torch.get_num_threads()` cores.
    """
    layout = NF4Layout(
        shape=tuple(weight.shape),
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        dtype=str(weight.dtype).removeprefix("torch."),
    )
    return quantize_chunks([weight.detach().contiguous().view(-1)], layout, weight.device), layout


def quantize_chunks(chunks: Iterable[torch.Tensor], layout: NF4Layout, device: torch.device) -> torch.Tensor:
    """Quantize a weight that is never in memory as a whole, and return uint8[layout.total_bytes] on the device.

    The chunks are consecutive parts of the flat weight, bf16, fp16 or fp32[n]. Each n but the last is a multiple of the
    largest block size. A chunk may be overwritten once the next is requested.
    """
    packed = torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device)
    absmax = torch.empty(layout.num_blocks, dtype=torch.float32, device=device)
    done = 0
    for chunk in chunks:
        _quantize_chunk(chunk.to(device), layout, packed[done // 2 :], absmax[done // layout.block_size :])
        done += chunk.numel()
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
    """Write the chunk's codes and absmax values to the start of `codes` and `absmax`."""
    block_size = layout.block_size

    def quantize_from(start: int) -> None:
        chunk_codes, chunk_absmax = _codes(flat[start : start + chunk], block_size, layout.quant_type)
        codes[start // 2 :][: chunk_codes.numel()] = chunk_codes
        absmax[start // block_size :][: chunk_absmax.numel()] = chunk_absmax

    chunk = _WEIGHTS_PER_CORE if flat.device.type == "cpu" else flat.numel()
    parallel_for_each(quantize_from, range(0, flat.numel(), chunk))


@functools.cache
def _cpu_code_bounds(quant_type: QuantType) -> CodeBounds:
    from qlora_dist.cpu.cpu_quantize import CodeBounds

    return CodeBounds.from_code_table(code_table(quant_type))


def _codes(weights: torch.Tensor, block_size: int, quant_type: QuantType) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes, uint8[ceil(n / 2)], and the absmax values, fp32[blocks].

    bitsandbytes computes them on other devices, for a short last block, and for weights that are not finite.
    """
    whole_blocks = weights.numel() - weights.numel() % block_size if weights.device.type == "cpu" else 0
    if whole_blocks:
        from qlora_dist.cpu.cpu_quantize import quantize_4bit_cpu

        codes, absmax = quantize_4bit_cpu(weights[:whole_blocks], block_size, _cpu_code_bounds(quant_type))
        if not absmax.isfinite().all():
            whole_blocks = 0
    if whole_blocks == weights.numel():
        return codes, absmax
    rest, state = bnb.quantize_4bit(weights[whole_blocks:], blocksize=block_size, quant_type=quant_type)
    if not whole_blocks:
        return rest.flatten(), state.absmax
    return torch.cat([codes, rest.flatten()]), torch.cat([absmax, state.absmax])


def dequantize_weight(packed: torch.Tensor, layout: NF4Layout, dtype: torch.dtype) -> torch.Tensor:
    """Return dtype[layout.shape], the weight that `packed: uint8[layout.total_bytes]` encodes.

    As in bitsandbytes, values are rounded to layout.dtype first.

    This avoids three traps of bitsandbytes 0.50 on the CPU:

    - Given the matrix's own shape, its AVX512 kernel reads the wrong absmax if in_features is a multiple of 16 but not
      of the block size. The shape passed is [blocks, block_size], or [numel] (single-threaded) if the matrix ends
      within a block.
    - It falls back to `torch.compile`, seconds for every new shape, if the number of weights is odd. So the last byte's
      second code is dequantized too, and dropped.
    - It does the same for blocks of 2048 and 4096. Such a block is passed as blocks of 1024 with the same absmax.
    """
    weight = _dequantize_flat(packed[layout.codes], dequantize_absmax(packed, layout), layout)
    return weight[: layout.numel].view(layout.shape).to(dtype)


def has_finite_scales(packed: torch.Tensor, layout: NF4Layout) -> bool:
    """Return whether all absmax values are finite, as they are if all values of the weight were."""
    part = layout.offset if layout.double_quant else layout.absmax  # the offset is the mean of the absmax values
    return bool(packed[part].view(torch.float32).isfinite().all())


def dequantize_rows(packed: torch.Tensor, layout: NF4Layout, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return dtype[n, columns], some rows of the matrix that a byte vector encodes, without dequantizing the others.

    The columns must be a multiple of the block size. The result equals these rows, int64[n], of `dequantize_weight`.
    """
    count, columns = layout.shape
    blocks = columns // layout.block_size
    assert blocks * layout.block_size == columns, f"rows of {layout.shape} end within a block of {layout.block_size}"
    codes = packed[layout.codes].view(count, -1)[rows]
    if layout.double_quant:
        block = rows.unsqueeze(1) * blocks + torch.arange(blocks, device=rows.device)
        scale = packed[layout.nested_absmax].view(torch.float32)[block // NESTED_BLOCK_SIZE]
        quantized = packed[layout.absmax].view(count, blocks)[rows]
        absmax = packed[layout.offset].view(torch.float32) + nested_code_table(packed.device)[quantized.int()] * scale
    else:
        absmax = packed[layout.absmax].view(torch.float32).view(count, blocks)[rows]
    return _dequantize_flat(codes.flatten(), absmax.flatten(), layout).view(-1, columns).to(dtype)


def _dequantize_flat(codes: torch.Tensor, absmax: torch.Tensor, layout: NF4Layout) -> torch.Tensor:
    """Dequantize codes uint8[n] with absmax fp32[blocks] to layout.dtype[2 n]."""
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
    """Return the absmax values, fp32[layout.num_blocks]."""
    if not layout.double_quant:
        return packed[layout.absmax].view(torch.float32)
    nested_absmax = packed[layout.nested_absmax].view(torch.float32)
    offset = packed[layout.offset].view(torch.float32)
    absmax: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        packed[layout.absmax], nested_absmax, nested_code_table(packed.device), NESTED_BLOCK_SIZE, torch.float32
    )
    return offset + absmax
