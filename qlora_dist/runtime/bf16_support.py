"""Check whether a device has bf16 instructions, without which bf16 is many times slower."""

from __future__ import annotations

from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of x86 processors, and the feature name of Arm processors."""
_MIN_CAPABILITY = (8, 0)
"""Compute capability of NVIDIA's Ampere."""


def bf16_warning(device: torch.device) -> str | None:
    """Return a sentence with the remedy if the device lacks bf16 instructions; None if it has them or may have them."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= _MIN_CAPABILITY:
            return None
        name, number = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        return (
            f"bf16 is emulated and slow on {name} (compute capability {number}, bf16 needs 8.0); "
            "set model.compute_dtype=fp16"
        )
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    if not lines or _BF16_CPU_FLAGS & set(lines[0].split()):
        return None
    return (
        "this processor has no bf16 instructions: bf16 is ten or more times slower here than fp32; "
        "set model.compute_dtype=fp32"
    )
