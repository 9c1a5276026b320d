"""Identity of a process, so that a later process with the same number is not mistaken for it.

It is the kernel's tick count at the process's start, which does not change when the clock is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CLOCK_TOLERANCE_S = 60.0
"""Seconds by which a start time may differ without a tick count, because the clock may have been set meanwhile."""


def process_identity(pid: int) -> dict[str, Any]:
    """Return what tells a process from a later one with the same number. Raise psutil.Error if it does not exist."""
    identity: dict[str, Any] = {"born": psutil.Process(pid).create_time()}
    try:
        # the name in parentheses may hold anything; the 20th field after it is the start time in ticks
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return identity | {"boot": _BOOT_ID.read_text(encoding="ascii").strip(), "start_ticks": int(fields[19])}
    except (OSError, ValueError, IndexError):
        return identity  # not Linux


def is_same_process(record: Mapping[str, Any], pid: int) -> bool:
    """Return whether process `pid` is the one that `record` describes; True if the record has no identity.

    If there is no such process, psutil.Error is raised.
    """
    now = process_identity(pid)
    if "start_ticks" in now and record.get("start_ticks") is not None:
        return bool(now["start_ticks"] == record["start_ticks"] and now["boot"] == record.get("boot"))
    born = record.get("born")
    return not isinstance(born, (int, float)) or bool(now["born"] <= born + _CLOCK_TOLERANCE_S)
