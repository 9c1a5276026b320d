"""Peak, current and available memory of a rank's device."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Return the allocator's peak on CUDA (not run on a GPU), and the process's peak resident size on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage is the last resort, because its maximum survives exec and so includes the launcher's memory
    status = _read_proc_bytes("/proc/self/status")
    if "VmHWM" in status:
        return status["VmHWM"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_resident_bytes() -> int:
    """Return the resident bytes of this process; 0 if the system does not report them."""
    return _read_proc_bytes("/proc/self/status").get("VmRSS", 0)


def free_memory_bytes(device: torch.device, local_world_size: int) -> int:
    """Return the bytes of a device that a rank can allocate; 0 if the system does not report them.

    On CUDA this is the device's free memory (not run on a GPU). On the CPU it is the rank's share of the memory that
    the system and the cgroups of this process have available.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _read_proc_bytes("/proc/meminfo").get("MemAvailable", 0)
    return min(available, *_cgroup_free_bytes()) // local_world_size


def memory_budget_bytes(device: torch.device, held_bytes: int, local_world_size: int) -> int:
    """Return the bytes that a component may use in total, given that it holds `held_bytes` and nothing else grows.

    On CUDA the component may take what the allocator has not reserved (not run on a GPU). The reservation includes the
    peak. On the CPU it may take `free_memory_bytes`, less what this process used at its peak and has released since. A
    twentieth of all memory stays free.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return held_bytes + free - total // 20
    total = _read_proc_bytes("/proc/meminfo").get("MemTotal", 0)
    status = _read_proc_bytes("/proc/self/status")
    if not total or "VmRSS" not in status:
        return held_bytes
    return (
        held_bytes
        + free_memory_bytes(device, local_world_size)
        - total // 20 // local_world_size
        - (status["VmHWM"] - status["VmRSS"])
    )


def _cgroup_free_bytes() -> list[int]:
    """Return the bytes left in each cgroup (version 2) that contains the process. Cached files count as free."""
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
    """Return the entries of a /proc file that are in kB, in bytes; none if the system has no such file."""
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    return {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
