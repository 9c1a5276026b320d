"""Where a benchmark was run. No torch."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import psutil

from qlora_dist import __version__
from qlora_dist.bench.jobs import cores
from qlora_dist.bench.result import Machine
from qlora_dist.plan.calibration import load_calibration

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed")


def this_machine(gpus: list[str]) -> Machine:
    """What it is.

    Args:
        gpus: names of those that are used; none: a CPU computes.
    """
    versions = {"qlora-dist": __version__, "Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions,
        system=platform.platform(),
        processor=_processor(),
        cores=cores(),
        memory_bytes=psutil.virtual_memory().total,
        device=", ".join(gpus) or "cpu",
        links_bytes_per_s={} if gpus else _links(),
        load_average=os.getloadavg()[0],
    )


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _links() -> dict[str, float]:
    measured = load_calibration().devices.get("cpu")
    if measured is None:
        return {}
    links = {"inside a node": measured.inside_bytes, "between nodes": measured.between_bytes}
    return {name: speed for name, speed in links.items() if speed}
