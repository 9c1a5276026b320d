"""Command `qlora-dist cancel`: stop a run, either with a checkpoint or at once."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

import psutil
from rich.console import Console

from qlora_dist.errors import UserError
from qlora_dist.launch.run_status import RunStatus, find_run_dir, read_run_statuses
from qlora_dist.launch.slurm_queue import scancel
from qlora_dist.runs.run_dir import REQUEUE_MARKER, STOPPED_MARKER
from qlora_dist.train.stop_requests import STOP_FILE

_LOCAL_POLL_S = 0.5
_SLURM_POLL_S = 2.0
_EXIT_TIMEOUT_S = 120.0


def cancel_run(folder: Path, name: str, *, now: bool, as_json: bool) -> None:
    """Stop a run, and wait until it has stopped. `now` loses the steps since its last checkpoint."""
    path = find_run_dir(folder, name)
    (run,) = read_run_statuses([path])
    if not run.is_active:
        raise UserError(f"{path}: does not run ({run.state}); `qlora-dist jobs` shows the active runs")
    if run.state == "waiting" and run.job_id is not None:
        scancel(run.job_id.split(".")[0])
        _wait_until_inactive(run, f"{run.name}: leaves the queue", _EXIT_TIMEOUT_S)
        _write_stopped_marker(run, "cancelled while it waited")
    elif now:
        _terminate(run)
        _write_stopped_marker(run, "cancelled at once")
    else:
        _request_stop(run)
    (run,) = read_run_statuses([path])
    if as_json:
        sys.stdout.write(json.dumps(run.to_json()) + "\n")
    else:
        done = "" if run.step is None else f" after {run.step} steps"
        sys.stdout.write(f"{run.name}: {run.state}{done}{f' ({run.reason})' if run.reason else ''}\n")


def _request_stop(run: RunStatus) -> None:
    stop = run.path / STOP_FILE
    stop.touch()
    _wait_until_inactive(run, f"{run.name}: finishes its step and writes a checkpoint")
    stop.unlink(missing_ok=True)  # a run that failed meanwhile leaves the file, which would stop its next start


def _terminate(run: RunStatus) -> None:
    if run.job_id is not None:
        scancel(run.job_id)
    else:
        _kill_processes(run)
    _wait_until_inactive(run, f"{run.name}: ends", _EXIT_TIMEOUT_S)


def _kill_processes(run: RunStatus) -> None:
    """Kill the launcher and its descendants, or else the process of rank 0. Ranks on other nodes then end too."""
    process = run.job if run.job.get("pid") else run.process
    if process.get("host") != socket.gethostname():
        raise UserError(f"{run.path}: runs on {process.get('host')}; call `qlora-dist cancel` there")
    try:
        first = psutil.Process(process.get("launcher_pid") or process["pid"])
        victims = [first, *first.children(recursive=True)]
    except (psutil.Error, KeyError, TypeError):
        return  # the process has just ended
    for victim in victims:
        try:
            victim.kill()
        except psutil.Error:
            continue


def _wait_until_inactive(run: RunStatus, message: str, timeout_s: float | None = None) -> None:
    started = time.monotonic()
    with Console(stderr=True).status(message):
        while read_run_statuses([run.path])[0].is_active:
            if timeout_s is not None and time.monotonic() - started > timeout_s:
                raise UserError(f"{run.path}: has not ended after {timeout_s:.0f} s; look at its processes")
            time.sleep(_LOCAL_POLL_S if run.job_id is None else _SLURM_POLL_S)


def _write_stopped_marker(run: RunStatus, reason: str) -> None:
    (run.path / REQUEUE_MARKER).unlink(missing_ok=True)
    (run.path / STOPPED_MARKER).write_text(
        json.dumps({"step": run.step or 0, "reason": reason}) + "\n", encoding="utf-8"
    )
