"""Command `qlora-dist jobs`: list runs with their states and progress, or print the output of one."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qlora_dist.errors import UserError
from qlora_dist.launch.run_status import RunStatus, find_run_dir, find_run_dirs, read_run_statuses
from qlora_dist.launch.slurm_queue import queued_jobs

_OUTPUT_POLL_S = 0.5
_STATUS_POLL_S = 3.0
_QUEUE_POLL_S = 1.0
_COLOURS = {"running": "green", "waiting": "yellow", "failed": "red", "to be requeued": "yellow"}


def print_runs(folder: Path, *, as_json: bool) -> None:
    """Print all runs in a folder, newest first."""
    runs = read_run_statuses(find_run_dirs(folder))
    if as_json:
        sys.stdout.write(json.dumps([run.to_json() for run in runs], indent=2) + "\n")
        return
    console = Console(highlight=False)
    if runs:
        console.print(_table(runs))
    else:
        console.print(f"no runs in {folder}", markup=False)


def _table(runs: list[RunStatus]) -> Table:
    table = Table("run", "state", "step", "loss", "tokens/s", "left", "where")
    for run in runs:
        steps = f"{'-' if run.step is None else run.step} of {'?' if run.steps is None else run.steps}"
        state = f"{run.state} ({run.reason})" if run.reason and run.state != "done" else run.state
        host = run.process.get("host") or run.job.get("host") or ""
        table.add_row(
            run.name,
            f"[{colour}]{state}[/]" if (colour := _COLOURS.get(run.state)) else state,
            steps,
            "" if run.loss is None else f"{run.loss:.4f}",
            "" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
            "" if run.left_s is None else str(timedelta(seconds=round(run.left_s))),
            f"job {run.job_id}" if run.job_id else str(host),
        )
    return table


def follow_run(folder: Path, name: str) -> None:
    """Print rank 0's output from its beginning until the run ends."""
    path = find_run_dir(folder, name)
    (run,) = read_run_statuses([path])
    if not isinstance(run.job.get("log"), str):
        raise UserError(
            f"{path}: the output file of this run is not recorded; look where its launcher writes its output"
        )
    log, position, checked_at = Path(run.job["log"]), 0, time.monotonic()
    while True:
        if time.monotonic() - checked_at > _STATUS_POLL_S:
            (run,), checked_at = read_run_statuses([path]), time.monotonic()
        position = print_new_output(log, position)
        if not run.is_active:
            return
        time.sleep(_OUTPUT_POLL_S)


def follow_job(job_id: int, log: Path) -> None:
    """Print the job's output until it ends."""
    position, has_ended = 0, False
    while True:
        position = print_new_output(log, position)
        if has_ended:
            return
        jobs = queued_jobs()
        has_ended = jobs is not None and str(job_id) not in jobs
        time.sleep(_QUEUE_POLL_S)


def print_new_output(log: Path, position: int) -> int:
    """Print the output after its first `position` bytes, and return its new size."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(position if position <= size else 0)  # a shorter file was begun anew
            sys.stdout.write(file.read().decode(errors="replace"))
            sys.stdout.flush()
            return file.tell()
    except OSError:
        return position  # the file does not exist yet
