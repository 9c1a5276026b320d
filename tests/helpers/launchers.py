"""Helpers of tests of launchers: which are installed, and which of their processes are left."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def skip_unless(available: object, reason: str) -> None:
    """Skip the test if something is missing, or fail it if QLORA_DIST_REQUIRE_LAUNCHERS is 1."""
    if available:
        return
    if os.environ.get("QLORA_DIST_REQUIRE_LAUNCHERS") == "1":
        pytest.fail(f"{reason} is missing")
    pytest.skip(f"{reason} is missing")


def mpi(name: str) -> Path:
    """Return the `bin` folder of MPICH (in this Python's environment) or Open MPI (in the one beside it)."""
    folder = Path(sys.prefix) if name == "mpich" else ROOT / ".venv-openmpi"
    skip_unless((folder / "bin" / ("mpichversion" if name == "mpich" else "ompi_info")).exists(), f"{name} in {folder}")
    return folder / "bin"


def environment(folder: Path) -> dict[str, str]:
    """Return the environment for a launcher, without variables of other launchers. `folder` marks its processes."""
    foreign = ("SLURM_", "OMPI_", "PMI", "PMIX_", "TORCHELASTIC_", "MASTER_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "QLORA_DIST_TEST": str(folder),
    }


def alive_pids(folder: Path) -> list[int]:
    """Return the ids of all processes with that folder in their environment."""
    mark = f"QLORA_DIST_TEST={folder}".encode()
    pids = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark in (process / "environ").read_bytes().split(b"\0"):
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
                pids += [] if state in "ZX" else [int(process.name)]
        except OSError:
            continue
    return pids
