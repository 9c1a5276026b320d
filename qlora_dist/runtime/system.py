"""Supported operating systems, the differences between them, and a description of the machine."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from qlora_dist import __version__
from qlora_dist.errors import UserError

_REPORTED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed")


def check_platform() -> None:
    """Raise UserError on Windows, which lacks the signals that stop runs and the forks that read data."""
    if sys.platform == "win32":
        raise UserError(
            "qlora-dist trains on Linux, and on macOS for trying, not on Windows; start it in WSL 2 (wsl --install)"
        )


def usable_cpu_count() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def user_cache_dir() -> Path:
    """Return the folder for cached files, in XDG_CACHE_HOME or in the user's home. Without a home raise UserError."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-dist"
    except RuntimeError:
        raise UserError(
            "this user has no home folder; set HOME or XDG_CACHE_HOME, or give data.cache a folder"
        ) from None


def machine_info(device: str) -> dict[str, Any]:
    """Return a description of this process's machine, with `device` cpu or cuda.

    The description has the names of the visible GPUs, and the load average over the last minute.
    """
    import torch

    gpus = range(torch.cuda.device_count() if device == "cuda" else 0)
    versions = {"qlora-dist": __version__, "Python": platform.python_version()}
    for name in _REPORTED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "system": platform.platform(),
        "processor": _processor(),
        "cores": usable_cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": ", ".join(torch.cuda.get_device_name(number) for number in gpus) or "cpu",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def _processor() -> str:
    try:
        name = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        name = None
    return name[1] if name else platform.processor() or platform.machine()
