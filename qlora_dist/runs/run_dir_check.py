"""Check that the entries of a run's folder have the right kind and that this user may write them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qlora_dist.checkpoint.manifest import CHECKPOINT_MANIFEST
from qlora_dist.errors import UserError
from qlora_dist.runs.run_dir import CHECKPOINTS_DIR, CONFIG_FILE, MARKERS, METRICS_FILE, PROCESS_FILE, RUN_SUBDIRS

_READ_WRITE_FILES = (METRICS_FILE, CONFIG_FILE, PROCESS_FILE)
"""Files that are read, and that are rewritten in place."""
_FILES = (*_READ_WRITE_FILES, "summary.json", "report.html", *MARKERS, "STOP", "SAVE")
"""Files of a run. `train/stop_requests.py` reads the last two."""


def check_run_dir(path: Path) -> None:
    """Check the folder of a run that is about to start, or its nearest parent if it does not exist yet.

    Raises:
        UserError: an entry has the wrong kind, or may not be read or written.
        OSError: an entry cannot be examined.
    """
    if not os.path.lexists(path):
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        if not parent.is_dir():
            raise UserError(f"{parent}: is not a folder; give run.dir another value")
        _require_access(parent, os.W_OK | os.X_OK, "written", "give run.dir another value")
        return
    if not path.is_dir():
        raise UserError(f"{path}: is not a folder, and a run needs a folder of its name; give run.name another value")
    _require_access(path, os.R_OK | os.W_OK | os.X_OK, "read and written", "give run.name another value")
    for name in _FILES:
        if (path / name).is_dir() or (os.path.lexists(path / name) and not (path / name).is_file()):
            raise UserError(f"{path / name}: is not a file, and a run needs a file there; move it away")
        if name in _READ_WRITE_FILES and (path / name).exists():
            _require_access(path / name, os.R_OK | os.W_OK, "read and written")
    for name in RUN_SUBDIRS:
        if os.path.lexists(path / name):
            if not (path / name).is_dir():
                raise UserError(f"{path / name}: is not a folder, and a run needs a folder there; move it away")
            _require_access(path / name, os.R_OK | os.W_OK | os.X_OK, "read and written")
    if (path / CHECKPOINTS_DIR).is_dir():
        for folder in sorted((path / CHECKPOINTS_DIR).glob("step-*")):
            _check_checkpoint(folder)


def _check_checkpoint(folder: Path) -> None:
    """Refuse a checkpoint that cannot be read, because resuming from an older one instead would lose steps."""
    if folder.is_dir():
        _require_access(folder, os.R_OK | os.W_OK | os.X_OK, "read and written")
        if (folder / CHECKPOINT_MANIFEST).is_file():
            _require_access(folder / CHECKPOINT_MANIFEST, os.R_OK, "read")


def _require_access(path: Path, mode: int, access: str, remedy: str = "") -> None:
    if os.access(path, mode):
        return
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        reason = "the file system is read-only"
    else:
        status = path.stat()
        reason = f"owned by user {status.st_uid}, mode {stat.S_IMODE(status.st_mode):03o}; this is user {os.geteuid()}"
    raise UserError(f"{path}: cannot be {access} ({reason}); change that{f', or {remedy}' if remedy else ''}")
