"""End of a rank whose launcher has died."""

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
    """Have this process killed when its launcher's process ends: torchrun's agent, or that of mpirun or SLURM.

    A launcher that is killed leaves its ranks behind. They hold their GPUs, and SLURM does not find them. Nothing
    happens without a launcher or on a system other than Linux.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    if started_by_torchrun():
        # SIGKILL, because a rank that waits for another handles no other signal
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), signal.SIGKILL)
    elif detect_launcher() in ("mpi", "srun"):
        # The kernel sends its signal when the forking thread ends, and Open MPI forks many ranks from short-lived
        # threads. So the parent is polled.
        threading.Thread(target=_kill_when_orphaned, args=(parent,), name="parent", daemon=True).start()


def _kill_when_orphaned(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
