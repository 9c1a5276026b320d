"""The most memory that a rank has held, and how much there is left."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch


def peak_bytes(device: torch.device) -> int:
    """On CUDA the allocator's peak (not run on a GPU); on the CPU the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # not getrusage where it can be helped: its maximum outlives exec, and so includes the launcher's
    own = _kilobytes("/proc/self/status")
    if "VmHWM" in own:
        return own["VmHWM"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def left_bytes(device: torch.device, held: int, local_world_size: int) -> int:
    """How much of a device's memory something can have that holds `held` bytes of it, if the rest grows no more.

    On CUDA what the allocator has not reserved, and it has reserved the peak (not run on a GPU). On the CPU what the
    system has available, shared with the node's other ranks, less what this process had at its peak and has given back.
    A twentieth of all memory stays free.

    Args:
        device: of the rank.
        held: bytes of it that are to be shared out anew.
        local_world_size: ranks of this node.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return held + free - total // 20
    memory = _kilobytes("/proc/meminfo")
    own = _kilobytes("/proc/self/status")
    if "MemAvailable" not in memory or "VmRSS" not in own:
        return held
    available = memory["MemAvailable"] - memory["MemTotal"] // 20
    return held + available // local_world_size - (own["VmHWM"] - own["VmRSS"])


def _kilobytes(path: str) -> dict[str, int]:
    """The lines of that unit, in bytes; of a system that has no such file, none."""
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    return {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
