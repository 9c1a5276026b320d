"""Status of a run, from its folder and SLURM's queue. Values of a missing or incomplete file count as unknown."""

from __future__ import annotations

import os
import socket
import statistics
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from qlora_dist.config.sections import DEFAULT_STEPS
from qlora_dist.errors import UserError
from qlora_dist.launch.slurm_queue import WAITING_STATES, queued_jobs
from qlora_dist.runs.json_object import parse_json_object, read_json_object
from qlora_dist.runs.run_dir import DONE_MARKER, PROCESS_FILE, REQUEUE_MARKER, STOPPED_MARKER
from qlora_dist.runtime.process_identity import is_same_process

JOB_FILE = "job.json"
"""File of `qlora-dist launch`, with launcher, job_id, host, pid, log and submitted."""
RunState = Literal["running", "waiting", "done", "stopped", "to be requeued", "failed"]
_TAIL_BYTES = 2**16
_RECENT_ROWS = 20
_NUMBER_KEYS = (
    *("step", "loss", "eval_loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_s", "data_s"),
    *("peak_bytes", "resident_bytes", "paged_bytes", "base_resident_bytes"),
)
_GROUP_KEYS = ("comm_bytes", "paging", "base_paging")
"""Keys of metrics.jsonl whose values are numbers, and keys whose values are objects of numbers."""
_MAX_NUMBER = 1e300
_MAX_SILENCE_S = 600.0
"""Seconds without a write after which a process on another machine counts as gone."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Status of a run. Unknown values are None."""

    name: str
    path: Path
    state: RunState
    reason: str | None
    """Reason why the run has ended."""
    step: int | None
    steps: int | None
    loss: float | None
    tokens_per_s: float | None
    left_s: float | None
    job: dict[str, Any]
    """Content of job.json."""
    process: dict[str, Any]
    """Content of process.json, which describes rank 0."""

    @property
    def job_id(self) -> str | None:
        """SLURM's number of the job, or of its step."""
        number = self.job.get("job_id") or self.process.get("job_id")
        return None if number is None else str(number)

    @property
    def is_active(self) -> bool:
        return self.state in ("running", "waiting")

    def to_json(self) -> dict[str, Any]:
        own = ("name", "state", "reason", "step", "steps", "loss", "tokens_per_s", "left_s")
        host = self.process.get("host") or self.job.get("host")
        extra = {"path": str(self.path), "job_id": self.job_id, "host": host, "log": self.job.get("log")}
        return {name: getattr(self, name) for name in own} | extra


def find_run_dirs(folder: Path) -> list[Path]:
    """Return the folders of runs, newest first."""
    traces = ("config.yaml", JOB_FILE, "metrics.jsonl")
    try:
        runs = [path for path in folder.iterdir() if any((path / name).is_file() for name in traces)]
        return sorted(runs, key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return []


def find_run_dir(folder: Path, name: str) -> Path:
    runs = {path.name: path for path in find_run_dirs(folder)}
    if name not in runs:
        names = ", ".join(sorted(runs)[:10]) or "no runs"
        raise UserError(f"{folder / name}: no such run; {folder} holds {names}; name their folder with --dir")
    return runs[name]


def read_run_statuses(paths: list[Path]) -> list[RunStatus]:
    """Return the statuses of runs. SLURM is queried only if one of them is a job."""
    runs = [read_run_status(path, None) for path in paths]
    if all(run.job_id is None for run in runs) or (queue := queued_jobs()) is None:
        return runs
    return [read_run_status(path, queue) for path in paths]


def read_run_status(path: Path, queue: dict[str, str] | None) -> RunStatus:
    """Return the status of the run in a folder. `queue` is the answer of `queued_jobs`; None if unknown."""
    job, process = read_json_object(path / JOB_FILE), read_json_object(path / PROCESS_FILE)
    markers = {
        name: read_json_object(path / name)
        for name in (DONE_MARKER, STOPPED_MARKER, REQUEUE_MARKER)
        if (path / name).is_file()
    }
    metrics = _last_metrics(path / "metrics.jsonl")
    state = _derive_state(path, job, process, set(markers), queue)
    marker = next(iter(markers.values()), {})
    recent = metrics[-_RECENT_ROWS:]
    step = metrics[-1]["step"] if metrics else None
    if _is_int(marker.get("step")):  # the last line of the metrics is missing if the disk was full
        step = max(step or 0, marker["step"])
    steps = process["steps"] if _is_int(process.get("steps")) else _configured_steps(path / "config.yaml")
    left_s = None
    if state == "running" and recent and steps is not None and step is not None:
        left_s = max(0, steps - step) * statistics.median(row["step_s"] for row in recent)
    return RunStatus(
        name=path.name,
        path=path,
        state=state,
        reason=marker.get("reason") if isinstance(marker.get("reason"), str) and state != "running" else None,
        step=step,
        steps=steps,
        loss=recent[-1]["loss"] if recent else None,
        tokens_per_s=statistics.median(row["tokens_per_s"] for row in recent) if recent else None,
        left_s=left_s,
        job=job,
        process=process,
    )


def _derive_state(
    path: Path, job: dict[str, Any], process: dict[str, Any], markers: set[str], queue: dict[str, str] | None
) -> RunState:
    job_id = str(job.get("job_id") or process.get("job_id") or "").split(".")[0]
    queued = (queue or {}).get(job_id)
    if queued in WAITING_STATES:
        return "waiting"
    if DONE_MARKER in markers or STOPPED_MARKER in markers:
        return "done" if DONE_MARKER in markers else "stopped"
    if job_id and queue is not None:
        if queued is not None:
            return "running"
        return "to be requeued" if REQUEUE_MARKER in markers else "failed"
    if _is_alive({"born": _parse_timestamp(job.get("submitted")), **job}) or _is_alive(process):
        return "running"
    if REQUEUE_MARKER in markers:
        return "to be requeued"
    on_other_host = process.get("host", socket.gethostname()) != socket.gethostname()
    return "running" if on_other_host and time.time() - _last_write_time(path) < _MAX_SILENCE_S else "failed"


def _is_alive(process: dict[str, Any]) -> bool:
    """Return whether a process runs on this machine, and is not a later one with the same number."""
    if process.get("host") != socket.gethostname() or not _is_int(process.get("pid")):
        return False
    try:
        ended = psutil.Process(process["pid"]).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return not ended and is_same_process(process, process["pid"])
    except (psutil.Error, ValueError, OverflowError):
        return False


def _last_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the last complete lines of steps, oldest first. Other lines are skipped."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return []
    rows = [row for line in lines if (row := parse_json_object(line)) and "loss" in row and is_metrics_row(row)]
    return [row for row in rows if row.get("tokens_per_s") is not None and row.get("step_s") is not None]


def _configured_steps(path: Path) -> int | None:
    try:
        train = yaml.safe_load(path.read_text(encoding="utf-8"))["train"]
        steps = train.get("steps") or (None if train.get("epochs") else DEFAULT_STEPS)
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None
    return steps if _is_int(steps) else None


def is_metrics_row(row: dict[str, Any]) -> bool:
    """Return whether a line of metrics.jsonl has a step, and a number or null under each numeric key."""
    return (
        _is_int(row.get("step"))
        and all(row.get(name) is None or is_finite_number(row[name]) for name in _NUMBER_KEYS)
        and all(_is_group(row[name]) for name in _GROUP_KEYS if row.get(name) is not None)
    )


def is_finite_number(value: object) -> bool:
    """Return whether a value is a number of moderate size, so that sums do not overflow."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER


def _is_group(value: object) -> bool:
    return isinstance(value, dict) and all(number is None or is_finite_number(number) for number in value.values())


def _parse_timestamp(time_of_day: Any) -> float | None:
    try:
        return datetime.fromisoformat(time_of_day).timestamp()
    except (ValueError, TypeError):
        return None


def _last_write_time(path: Path) -> float:
    try:
        return max(entry.stat().st_mtime for entry in path.iterdir())
    except (OSError, ValueError):
        return 0.0


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
