"""`qlora-dist cancel`: stop a run with a checkpoint, or at once."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

import psutil
from rich.console import Console

from qlora_dist.errors import UserError
from qlora_dist.launch.run_status import Run, read_runs, run_folder
from qlora_dist.launch.slurm_queue import scancel
from qlora_dist.runs.run_dir import REQUEUE, STOPPED
from qlora_dist.train.stop_requests import STOP_FILE

_LOOK_S = 0.5
_ASK_S = 2.0
_DEAD_S = 120.0


def cancel(folder: Path, name: str, now: bool, as_json: bool) -> None:
    """Have a run stop, and wait until it has.

    Args:
        folder: of all runs.
        name: of this one.
        now: end its processes, and lose the steps since its last checkpoint.
        as_json: print the outcome as JSON.

    Raises:
        UserError: there is nothing to stop, or it cannot be stopped from here.
    """
    path = run_folder(folder, name)
    (run,) = read_runs([path])
    if not run.active:
        raise UserError(f"{path}: does not run ({run.state}); `qlora-dist jobs` shows those that do")
    if run.state == "waiting" and run.job_id is not None:
        scancel(run.job_id.split(".")[0])
        _wait(run, f"{run.name}: leaves the queue", _DEAD_S)
        _mark(run, "cancelled while it waited")
    elif now:
        _end(run)
        _mark(run, "cancelled at once")
    else:
        _stop(run)
    (run,) = read_runs([path])
    if as_json:
        sys.stdout.write(json.dumps(run.to_json()) + "\n")
    else:
        done = "" if run.step is None else f" after {run.step} steps"
        sys.stdout.write(f"{run.name}: {run.state}{done}{f' ({run.reason})' if run.reason else ''}\n")


def _stop(run: Run) -> None:
    """After the step that it is at."""
    stop = run.path / STOP_FILE
    stop.touch()
    _wait(run, f"{run.name}: finishes its step and writes a checkpoint")
    stop.unlink(missing_ok=True)  # a run that has failed meanwhile has not taken it away, and would stop when started


def _end(run: Run) -> None:
    if run.job_id is not None:
        scancel(run.job_id)
    else:
        _kill(run)
    _wait(run, f"{run.name}: ends", _DEAD_S)


def _kill(run: Run) -> None:
    """The launcher with all that it has started, or else the process itself; ranks on other nodes notice."""
    process = run.job if run.job.get("pid") else run.process
    if process.get("host") != socket.gethostname():
        raise UserError(f"{run.path}: runs on {process.get('host')}; call `qlora-dist cancel` there")
    try:
        first = psutil.Process(process.get("launcher_pid") or process["pid"])
        victims = [first, *first.children(recursive=True)]
    except (psutil.Error, KeyError, TypeError):
        return  # it has just ended
    for victim in victims:
        try:
            victim.kill()
        except psutil.Error:
            continue


def _wait(run: Run, what: str, longest_s: float | None = None) -> None:
    started = time.monotonic()
    with Console(stderr=True).status(what):
        while read_runs([run.path])[0].active:
            if longest_s is not None and time.monotonic() - started > longest_s:
                raise UserError(f"{run.path}: has not ended after {longest_s:.0f} s; look at its processes")
            time.sleep(_LOOK_S if run.job_id is None else _ASK_S)


def _mark(run: Run, reason: str) -> None:
    """It cannot do that itself any more."""
    (run.path / REQUEUE).unlink(missing_ok=True)
    (run.path / STOPPED).write_text(json.dumps({"step": run.step or 0, "reason": reason}) + "\n", encoding="utf-8")
