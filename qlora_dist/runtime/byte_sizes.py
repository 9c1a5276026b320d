"""Arithmetic and text of sizes in bytes. No torch."""

from __future__ import annotations

COMPUTE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of an element by compute type."""
LOSS_CHUNK_LOGITS = 2**24
"""Logits that the loss makes in one product: larger products read the weight less often."""
_PACKED_ALIGNMENT = 16  # a multiple of every element size


def align_bytes(nbytes: int) -> int:
    """Return where the next part of a packed weight, or the next shard of a page, begins after `nbytes` bytes."""
    return -(-nbytes // _PACKED_ALIGNMENT) * _PACKED_ALIGNMENT


def format_bytes(nbytes: float) -> str:
    """Return a size with its unit, such as "1.50 GiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"


def format_gib(nbytes: int) -> str:
    """Return a size in GiB, without the unit."""
    return f"{nbytes / 2**30:,.2f}"
