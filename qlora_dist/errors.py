"""Errors that are shown to users without a traceback."""

from __future__ import annotations

import sys
from contextlib import suppress


class UserError(Exception):
    """Error that the user can correct. The command line prints its message without a traceback and exits with 2.

    Any other exception is a fault of this package and keeps its traceback.

    Args:
        message: one sentence that names the problem, its location and the remedy.
        local_only: True if the other ranks cannot detect the error. Otherwise rank 0 reports it for all ranks.
        retryable: True if the cause may be a lost node, so that restarting may succeed.
    """

    def __init__(self, message: str, *, local_only: bool = False, retryable: bool = False) -> None:
        super().__init__(message)
        self.local_only = local_only
        self.retryable = retryable


def write_stderr(text: str) -> None:
    """Write one line to stderr, with the program's name. A closed stderr is ignored."""
    with suppress(OSError):
        sys.stderr.write(f"qlora-dist: {text}\n")
        sys.stderr.flush()
