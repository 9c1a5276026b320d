"""The most memory that a rank has held, and how much there is."""

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
    try:
        # not getrusage where it can be helped: its maximum outlives exec, and so includes the launcher's
        high_water = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        high_water = None
    if high_water:
        return int(high_water[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: torch.device, local_world_size: int) -> int:
    """What a rank can have of a device: on CUDA what is free of it (not run on a GPU), on the CPU its part of the
    memory that the system has available, and the cgroups that this process is in. 0 where nobody knows.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return 0
    if available is None:
        return 0
    return min(int(available[1]) * 1024, *_free_in_cgroups()) // local_world_size


def _free_in_cgroups() -> list[int]:
    """Up to the limits of the process's cgroups (version 2), its own and those around it; cached files can go."""
    free = [sys.maxsize]
    try:
        path = Path("/proc/self/cgroup").read_text().strip().rpartition("0::/")[2]
        root = Path("/sys/fs/cgroup")
        for folder in (root / path, *(root / path).parents):
            if root not in folder.parents or not (folder / "memory.max").exists():
                continue
            limit = (folder / "memory.max").read_text().strip()
            files = re.search(r"^file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
            if limit != "max" and files:
                free.append(int(limit) - int((folder / "memory.current").read_text()) + int(files[1]))
    except OSError:
        pass
    return free
