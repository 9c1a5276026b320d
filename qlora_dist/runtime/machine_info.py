"""Description of the machine that a run uses, stored with the run's figures."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from qlora_dist import __version__
from qlora_dist.runtime.system import usable_cpu_count

_REPORTED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed")


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
