"""Tensor to byte vector and back, with bitsandbytes' own operators, so that every value is bit-equal to its."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch

from qlora_dist.nf4.encode import encode
from qlora_dist.nf4.layout import NESTED_BLOCK_SIZE, NF4Layout, QuantType
from qlora_dist.nf4.tables import nested_code_table
from qlora_dist.nf4.threads import for_each

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_LARGEST_KERNEL_BLOCK = 1024  # weights
_CHUNK = 2**20  # weights that one core quantizes at a time, a multiple of every block size


def quantize(
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
    binary search: there the codes are ours (`encode`), a chunk at a time, on `torch.get_num_threads()` cores.
    """
    layout = NF4Layout(
        tuple(weight.shape), quant_type, block_size, double_quant, str(weight.dtype).removeprefix("torch.")
    )
    flat = weight.detach().contiguous().view(-1)
    packed = torch.zeros(layout.total_bytes, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(layout.blocks, dtype=torch.float32, device=weight.device)

    def quantize_from(start: int) -> None:
        codes, chunk_absmax = _codes(flat[start : start + chunk], block_size, quant_type)
        packed[start // 2 :][: codes.numel()] = codes
        absmax[start // block_size :][: chunk_absmax.numel()] = chunk_absmax

    chunk = _CHUNK if weight.device.type == "cpu" else layout.blocks * block_size
    for_each(quantize_from, range(0, layout.numel, chunk))
    if double_quant:
        offset = absmax.mean()
        quantized, nested = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
        packed[layout.absmax] = quantized
        packed[layout.nested_absmax] = nested.absmax.view(torch.uint8)
        packed[layout.offset] = offset.reshape(1).view(torch.uint8)
    else:
        packed[layout.absmax] = absmax.view(torch.uint8)
    return packed, layout


def _codes(weights: torch.Tensor, block_size: int, quant_type: QuantType) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8[ceil(n / 2)] and fp32[blocks]. bitsandbytes': off the CPU, for the last block where it is short, and for
    weights that are not finite, whose codes are then its.
    """
    whole = weights.numel() - weights.numel() % block_size if weights.device.type == "cpu" else 0
    if whole:
        codes, absmax = encode(weights[:whole], block_size, quant_type)
        if not absmax.isfinite().all():
            whole = 0
    if whole == weights.numel():
        return codes, absmax
    rest, state = bnb.quantize_4bit(weights[whole:], blocksize=block_size, quant_type=quant_type)
    if not whole:
        return rest.flatten(), state.absmax
    return torch.cat([codes, rest.flatten()]), torch.cat([absmax, state.absmax])


def dequantize(packed: torch.Tensor, layout: NF4Layout, dtype: torch.dtype) -> torch.Tensor:
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
    absmax, block_size = _absmax(packed, layout), layout.block_size
    numel = 2 * layout.codes.stop
    if block_size > _LARGEST_KERNEL_BLOCK:
        absmax = absmax.repeat_interleave(block_size // _LARGEST_KERNEL_BLOCK)
        block_size = _LARGEST_KERNEL_BLOCK
    flat = (numel // block_size, block_size) if numel % block_size == 0 else (numel,)
    weight = torch.ops.bitsandbytes.dequantize_4bit(
        packed[layout.codes], absmax, block_size, layout.quant_type, flat, TORCH_DTYPES[layout.dtype]
    )
    return weight.flatten()[: layout.numel].view(layout.shape).to(dtype)


def _absmax(packed: torch.Tensor, layout: NF4Layout) -> torch.Tensor:
    """absmax: fp32[layout.blocks]."""
    if not layout.double_quant:
        return packed[layout.absmax].view(torch.float32)
    nested_absmax = packed[layout.nested_absmax].view(torch.float32)
    offset = packed[layout.offset].view(torch.float32)
    return offset + torch.ops.bitsandbytes.dequantize_blockwise(
        packed[layout.absmax],
        nested_absmax,
        nested_code_table(packed.device),
        NESTED_BLOCK_SIZE,
        torch.float32,
    )
