"""Ending one of many ranks, where the launcher ends the others as soon as one has failed.

srun --kill-on-bad-exit and mpirun do that within a moment and without asking. torchrun asks first (SIGTERM), which a
run takes note of, and has no need of this.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import NoReturn

from qlora_dist.runtime.environment import RankInfo, detect_launcher

_RANK_0_REPORT_S = 10.0
_PEER_REPORT_S = 2.0


def _launcher_kills_at_once() -> bool:
    return detect_launcher() in ("mpi", "srun")


def wait_for_rank_0_report(ranks: RankInfo) -> bool:
    """Wait for the end that rank 0's end brings, after a mistake that it most likely has found as well.

    Returns:
        Whether it has not found it, as far as can be known, and this rank is the one of its node to tell it.
    """
    if not _launcher_kills_at_once():
        return False
    time.sleep(_RANK_0_REPORT_S)
    return ranks.local_rank == 0


def delay_exit_for_peers() -> None:
    """Before this rank's end is theirs."""
    if _launcher_kills_at_once():
        time.sleep(_PEER_REPORT_S)


def exit_process(code: int) -> NoReturn:
    """End the process.

    Under mpirun at once: MPICH takes a rank that leaves in good order for one that is done, whatever its exit code, and
    lets the others wait for it.
    """
    if detect_launcher() != "mpi":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_with_traceback(error: Exception) -> NoReturn:
    """After an error of ours."""
    if detect_launcher() != "mpi":
        raise error
    traceback.print_exception(error)
    exit_process(1)
