"""The operating system: which are supported, and what differs between them."""

from __future__ import annotations

import os
import sys

from qlora_dist.errors import UserError


def check_system() -> None:
    """Refuse Windows, which has neither the signals by which runs are stopped nor the forks by which data is read.

    Raises:
        UserError: this is Windows.
    """
    if sys.platform == "win32":
        raise UserError(
            "qlora-dist trains on Linux, and on macOS for trying, not on Windows; start it in WSL 2 (wsl --install)"
        )


def cores() -> int:
    """Count those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
