"""Supported operating systems, and the differences between them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qlora_dist.errors import UserError


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
