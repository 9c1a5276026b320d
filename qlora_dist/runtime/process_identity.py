"""Which process a number stands for: the kernel's own count since the start of the machine, which no clock changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CLOCK_TOLERANCE_S = 60.0
"""Seconds by which a start time may be off where the kernel gives no count: the clock may have been set meanwhile."""


def process_identity(pid: int) -> dict[str, Any]:
    """Return what tells a process from a later one with the same number, for `is_same_process`.

    Raises:
        psutil.Error: there is no such process.
    """
    found: dict[str, Any] = {"born": psutil.Process(pid).create_time()}
    try:
        # behind the name, which may hold anything: state, parent, ..., and as the 20th the ticks since the start
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return found | {"boot": _BOOT_ID.read_text(encoding="ascii").strip(), "start_ticks": int(fields[19])}
    except (OSError, ValueError, IndexError):
        return found  # not Linux


def is_same_process(record: Mapping[str, Any], pid: int) -> bool:
    """Whether the process of this number is the one of `record`, which `process_identity` wrote; true if the record is silent.

    Raises:
        psutil.Error: there is no such process.
    """
    now = process_identity(pid)
    if "start_ticks" in now and record.get("start_ticks") is not None:
        return bool(now["start_ticks"] == record["start_ticks"] and now["boot"] == record.get("boot"))
    born = record.get("born")
    return not isinstance(born, (int, float)) or bool(now["born"] <= born + _CLOCK_TOLERANCE_S)
