"""Integers of 1 to 8 bits that are packed into words of 32 bits, and their values with scales and zero points."""

from __future__ import annotations

import torch

from qlora_dist.errors import UserError

WORD_BITS = 32


def packed_words(count: int, bits: int) -> int:
    """Return the number of words that hold `count` integers of `bits` bits."""
    return -(-count * bits // WORD_BITS)


def unpack_integers(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the integers in rows of words, int32[rows, words] -> uint8[rows, count].

    Integer i of a row has the bits i * bits to (i + 1) * bits, counted from the lowest bit of the first word. The
    result of 8 bits shares the memory of `words`.
    """
    rows, length = words.shape
    if 8 % bits == 0:  # no integer crosses the border of a byte
        if words.stride(1) != 1:  # `contiguous` would leave a matrix of one column as it is
            words = words.clone(memory_format=torch.contiguous_format)
        data = words.view(torch.uint8)
        per_byte = 8 // bits
        if per_byte == 1:
            return data[:, :count]
        out = torch.empty(rows, data.shape[1] * per_byte, dtype=torch.uint8, device=words.device)
        for i in range(per_byte):
            out[:, i::per_byte] = (data >> (i * bits)) & (2**bits - 1)
        return out[:, :count]
    periods = -(-length // bits)  # the pattern repeats after 32 integers, in `bits` words
    words = torch.nn.functional.pad(words, (0, periods * bits - length))
    out = torch.empty(rows, periods * WORD_BITS, dtype=torch.uint8, device=words.device)
    for i in range(WORD_BITS):
        word, offset = divmod(i * bits, WORD_BITS)
        low_bits = min(bits, WORD_BITS - offset)
        value = (words[:, word::bits] >> offset) & (2**low_bits - 1)  # the shift repeats the sign
        if low_bits < bits:
            value |= (words[:, word + 1 :: bits] & (2 ** (bits - low_bits) - 1)) << low_bits
        out[:, i::WORD_BITS] = value
    return out[:, :count]


def apply_scales(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (codes - zeros) * scales in the scales' type, [rows, columns].

    The difference of two integers of 8 bits is exact in each of the types, so the only rounding is the product's.

    Args:
        codes: integers, [rows, columns].
        scales: [rows or 1, groups], a scale for each group of columns.
        zeros: integers of the same shape as `scales`; None: they are 0.
        group_index: the group of each column, int32[columns]; None: the groups are equal ranges of columns.

    Raises:
        UserError: on a CPU, the index names a group without a scale.
    """
    values = codes.to(scales.dtype)
    if group_index is None:
        groups = values.unflatten(1, (scales.shape[1], -1))
        if zeros is not None:
            groups -= zeros.to(scales.dtype).unsqueeze(2)
        groups *= scales.unsqueeze(2)
        return values
    if group_index.device.type == "cpu" and not bool(((group_index >= 0) & (group_index < scales.shape[1])).all()):
        raise UserError(
            f"a weight's g_idx names another group than its {scales.shape[1]} with scales; get the model anew",
            local_only=True,
        )
    if zeros is not None:
        values -= zeros.to(scales.dtype).index_select(1, group_index)
    return values.mul_(scales.index_select(1, group_index))
