"""`qlora-dist jobs`: what runs, what has run, and how far it is."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qlora_dist.errors import UserError
from qlora_dist.launch.run_status import Run, find_runs, read_runs, run_folder

_LOOK_S = 0.5
_ASK_S = 3.0
_COLOURS = {"running": "green", "waiting": "yellow", "failed": "red", "to be requeued": "yellow"}


def list_runs(folder: Path, as_json: bool) -> None:
    """Print all runs of a folder, the newest first."""
    runs = read_runs(find_runs(folder))
    if as_json:
        sys.stdout.write(json.dumps([run.to_json() for run in runs], indent=2) + "\n")
        return
    console = Console(highlight=False)
    if not runs:
        console.print(f"no runs in {folder}", markup=False)
        return
    console.print(_table(runs))


def _table(runs: list[Run]) -> Table:
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


def follow(folder: Path, name: str) -> None:
    """Print what rank 0 prints, from its beginning until the run ends.

    Raises:
        UserError: there is no such run, or nobody knows where its output goes.
    """
    path = run_folder(folder, name)
    (run,) = read_runs([path])
    if not isinstance(run.job.get("log"), str):
        raise UserError(
            f"{path}: who started this run did not say where its output goes; look where its launcher writes"
        )
    log, position, asked = Path(run.job["log"]), 0, time.monotonic()
    while True:
        if time.monotonic() - asked > _ASK_S:
            (run,), asked = read_runs([path]), time.monotonic()
        position = print_from(log, position)
        if not run.active:
            return
        time.sleep(_LOOK_S)


def print_from(log: Path, position: int) -> int:
    """Print what has come to an output since it had `position` bytes, and return how many it has now."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(position if position <= size else 0)  # it was begun anew
            sys.stdout.write(file.read().decode(errors="replace"))
            sys.stdout.flush()
            return file.tell()
    except OSError:
        return position  # not there yet
