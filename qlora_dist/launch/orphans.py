"""No rank outlives the agent that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from qlora_dist.launch.environment import started_by_torchrun

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when torchrun's agent is gone. Linux only; elsewhere nothing.

    An agent that is killed outright leaves its ranks behind, holding their GPUs, where SLURM doesn't find them. Under
    other launchers the parent is their proxy, which has its own way of ending ranks and need not live as long as they.
    """
    if not sys.platform.startswith("linux") or not started_by_torchrun():
        return
    parent = os.getppid()
    # SIGKILL, for a rank that waits for another hears nothing else
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        return
    if os.getppid() != parent:  # it went away in between
        os.kill(os.getpid(), signal.SIGKILL)
