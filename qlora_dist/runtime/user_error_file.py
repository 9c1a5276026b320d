"""Telling a job script that the user has to mend something, so that it does not start the ranks again."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from qlora_dist.errors import UserError

JOB_DIR_VARIABLE = "QLORA_DIST_JOB"
"""The variable in which a rendered job script names its folder."""
USER_ERROR_FILE = "MISTAKE"
"""The file in there that holds the sentence."""


def write_user_error_file(error: UserError) -> None:
    """Write the sentence down, if this runs in such a job. An exit code would not reach the script."""
    folder = os.environ.get(JOB_DIR_VARIABLE)
    if folder and not error.retryable:
        with suppress(OSError):
            (Path(folder) / USER_ERROR_FILE).write_text(f"{error}\n", encoding="utf-8")
