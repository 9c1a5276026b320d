"""A layout's run as a separate job on this machine."""

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
    """Return each rank's share of the cores of this process."""
    return max(1, usable_cpu_count() // ranks)


def run_local_job(case: BenchCase, folder: Path) -> RunFiles:
    """Train in one process or on torchrun's ranks, and read the run's files.

    The configuration and the log are written into `folder`, and its `run.dir` is below.

    Raises:
        UserError: the run reported a user's error.
        RuntimeError: the run failed otherwise; the message has the end of its log.
    """
    config, log = folder / f"{case.name}.yaml", folder / f"{case.name}.log"
    config.write_text(dump_config(case.config), encoding="utf-8")
    command = [sys.executable]
    if case.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    command += ["-m", "qlora_dist", "train", str(config), "--resume", "none"]
    environ = os.environ | {"OMP_NUM_THREADS": str(threads_per_rank(case.ranks)), "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(command, env=environ, stdout=output, stderr=output, check=False).returncode
    if code:
        text = log.read_text(encoding="utf-8", errors="replace")
        user_errors = re.findall(r"^qlora-dist: (.+)$", text, re.MULTILINE)
        if user_errors:
            raise UserError(f"{case.label}: {user_errors[0]}")
        raise RuntimeError(f"{case.name} ended with exit code {code}\n" + "\n".join(text.splitlines()[-_LAST_LINES:]))
    run = Path(case.config.run.dir) / case.config.run.name
    files = read_run_files(run)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return files
