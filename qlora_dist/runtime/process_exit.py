"""Exit of a rank whose launcher has died, or kills the other ranks as soon as one has failed.

srun --kill-on-bad-exit and mpirun kill them within a moment. torchrun sends SIGTERM first, which a run handles, so that
it needs none of these delays.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import RankInfo, detect_launcher, started_by_torchrun

JOB_DIR_VARIABLE = "QLORA_DIST_JOB"
"""Environment variable in which a rendered job script passes its folder."""
USER_ERROR_FILE = "MISTAKE"
"""Name of the file in that folder that holds the error message."""
_RANK_0_REPORT_S = 10.0
_PEER_REPORT_S = 2.0
_PR_SET_PDEATHSIG = 1
_PARENT_POLL_S = 0.5


def write_user_error_file(error: UserError) -> None:
    """Write the message to the job's folder, if a job script started this process.

    The script then does not restart the ranks. It would not receive an exit code.
    """
    folder = os.environ.get(JOB_DIR_VARIABLE)
    if folder and not error.retryable:
        with suppress(OSError):
            (Path(folder) / USER_ERROR_FILE).write_text(f"{error}\n", encoding="utf-8")


def _launcher_kills_at_once() -> bool:
    return detect_launcher() in ("mpi", "srun")


def wait_for_rank_0_report(ranks: RankInfo) -> bool:
    """Wait for rank 0 to report a user's error, which it has most likely detected too. Its exit then ends this rank.

    Return whether this rank must report the error for its node, because rank 0 apparently has not.
    """
    if not _launcher_kills_at_once():
        return False
    time.sleep(_RANK_0_REPORT_S)
    return ranks.local_rank == 0


def delay_exit_for_peers() -> None:
    """Delay the exit, so that other ranks can print before the launcher kills them."""
    if _launcher_kills_at_once():
        time.sleep(_PEER_REPORT_S)


def exit_process(code: int) -> NoReturn:
    """End the process.

    Under mpirun skip MPI_Finalize. MPICH takes a rank that finalizes for one that is done, whatever its exit code, and
    lets the other ranks wait for it.
    """
    if detect_launcher() != "mpi":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_with_traceback(error: Exception) -> NoReturn:
    """End the process after an unexpected error, with its traceback."""
    if detect_launcher() != "mpi":
        raise error
    traceback.print_exception(error)
    exit_process(1)


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
