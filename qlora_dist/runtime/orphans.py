"""No rank outlives the launcher that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

from qlora_dist.runtime.environment import detect_launcher, started_by_torchrun

_PR_SET_PDEATHSIG = 1
_PARENT_POLL_S = 0.5


def die_with_parent() -> None:
    """Have this process killed when the one that started it is gone: torchrun's agent, or mpirun's or SLURM's process.

    Killed outright they leave their ranks behind, holding their GPUs, where SLURM doesn't find them. Without a launcher
    nothing happens, nor where the system isn't Linux.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    if started_by_torchrun():
        # SIGKILL, for a rank that waits for another hears nothing else
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it went away in between
            os.kill(os.getpid(), signal.SIGKILL)
    elif detect_launcher() in ("mpi", "srun"):
        # the kernel's signal comes when the thread ends that has forked, and Open MPI forks many ranks from threads of
        # no long life
        threading.Thread(target=_kill_when_orphaned, args=(parent,), name="parent", daemon=True).start()


def _kill_when_orphaned(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
