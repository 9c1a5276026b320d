"""A layout's run, as a job of its own on this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from qlora_dist.bench.bench_layouts import BenchCase
from qlora_dist.config.config_file import dump_config
from qlora_dist.errors import UserError
from qlora_dist.report.run_files import RunFiles, read_run_files
from qlora_dist.runtime.system import usable_cpu_count

_LAST_LINES = 40


def threads_per_rank(ranks: int) -> int:
    """The cores of this process, shared among ranks."""
    return max(1, usable_cpu_count() // ranks)


def run_local_job(cell: BenchCase, folder: Path) -> RunFiles:
    """Train, in one process or on torchrun's ranks, and read what the run has left.

    Args:
        cell: the layout; `run.dir` of its configuration is below `folder`.
        folder: of what is written.

    Raises:
        UserError: what the run has said is the user's to mend.
        RuntimeError: it has failed; with the end of what it wrote.
    """
    config, log = folder / f"{cell.name}.yaml", folder / f"{cell.name}.log"
    config.write_text(dump_config(cell.config), encoding="utf-8")
    command = [sys.executable]
    if cell.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cell.ranks}"]
    command += ["-m", "qlora_dist", "train", str(config), "--resume", "none"]
    environ = os.environ | {"OMP_NUM_THREADS": str(threads_per_rank(cell.ranks)), "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(command, env=environ, stdout=output, stderr=output, check=False).returncode
    if code:
        text = log.read_text(encoding="utf-8", errors="replace")
        user_errors = re.findall(r"^qlora-dist: (.+)$", text, re.MULTILINE)
        if user_errors:
            raise UserError(f"{cell.words}: {user_errors[0]}")
        raise RuntimeError(f"{cell.name} ended with exit code {code}\n" + "\n".join(text.splitlines()[-_LAST_LINES:]))
    run = Path(cell.config.run.dir) / cell.config.run.name
    files = read_run_files(run)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return files
