"""The one exception a user is meant to see."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user's: one sentence that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 2. Everything else that is raised is ours and
    keeps its traceback.

    Args:
        sentence: what is wrong, where, and what to do.
        one_rank: only this rank knows; most mistakes are found by all ranks alike, and rank 0 speaks for them.
        passing: it may be no mistake but a node that is lost: another start may do.
    """

    def __init__(self, message: str, local_only: bool = False, retryable: bool = False) -> None:
        super().__init__(message)
        self.local_only = local_only
        self.retryable = retryable
