"""The most memory that a rank has held, and how much there is left."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """On CUDA the allocator's peak (not run on a GPU); on the CPU the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # not getrusage where it can be helped: its maximum outlives exec, and so includes the launcher's
    own = _read_proc_bytes("/proc/self/status")
    if "VmHWM" in own:
        return own["VmHWM"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_resident_bytes() -> int:
    """Of this process, now; 0 where nobody knows."""
    return _read_proc_bytes("/proc/self/status").get("VmRSS", 0)


def free_memory_bytes(device: torch.device, local_world_size: int) -> int:
    """What a rank can have of a device: on CUDA what is free of it (not run on a GPU), on the CPU its part of the
    memory that the system has available, and the cgroups that this process is in. 0 where nobody knows.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _read_proc_bytes("/proc/meminfo").get("MemAvailable", 0)
    return min(available, *_cgroup_free_bytes()) // local_world_size


def memory_budget_bytes(device: torch.device, held_bytes: int, local_world_size: int) -> int:
    """How much of a device's memory something can have that holds `held_bytes` bytes of it, if the rest grows no more.

    On CUDA what the allocator has not reserved, and it has reserved the peak (not run on a GPU). On the CPU what the
    rank can have of it (`free_memory_bytes`), less what this process had at its peak and has given back.
    A twentieth of all memory stays free.

    Args:
        device: of the rank.
        held_bytes: bytes of it that are to be shared out anew.
        local_world_size: ranks of this node.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return held_bytes + free - total // 20
    total = _read_proc_bytes("/proc/meminfo").get("MemTotal", 0)
    own = _read_proc_bytes("/proc/self/status")
    if not total or "VmRSS" not in own:
        return held_bytes
    return (
        held_bytes
        + free_memory_bytes(device, local_world_size)
        - total // 20 // local_world_size
        - (own["VmHWM"] - own["VmRSS"])
    )


def _cgroup_free_bytes() -> list[int]:
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


def _read_proc_bytes(path: str) -> dict[str, int]:
    """The lines of that unit, in bytes; of a system that has no such file, none."""
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    return {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
