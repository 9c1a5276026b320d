"""Folder of a run, with its configuration, metrics and results. Only rank 0 writes to it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora_dist.checkpoint.manifest import abandon_checkpoint
from qlora_dist.config.config_file import dump_config
from qlora_dist.config.schema import Config
from qlora_dist.config.sections import RunConfig
from qlora_dist.errors import UserError
from qlora_dist.runs.json_object import read_json_object
from qlora_dist.runs.metrics_file import MetricsFile, nonfinite_to_none
from qlora_dist.runtime.environment import launch_id, process_record

DONE_MARKER, REQUEUE_MARKER, STOPPED_MARKER = "DONE", "REQUEUE", "STOPPED"
"""Markers of a clean end: at the last step, for a restart by the launcher, or at a user's request.

Each holds {"step", "reason"}. Exit codes cannot replace them, because launchers hide or change exit codes."""
MARKERS = (DONE_MARKER, REQUEUE_MARKER, STOPPED_MARKER)
PROCESS_FILE = "process.json"
"""Process and machine of rank 0, number of steps of the run, and its launch. Other commands read it."""

METRICS_FILE, CONFIG_FILE = "metrics.jsonl", "config.yaml"
CHECKPOINTS_DIR = "checkpoints"
RUN_SUBDIRS = (CHECKPOINTS_DIR, "adapter", "tensorboard")
"""Folders of an old run with the same name that a new run removes."""


def run_path(config: RunConfig) -> Path:
    return Path(config.dir) / config.name


class RunDir:
    """Folder of a run that has begun."""

    def __init__(
        self,
        config: Config,
        *,
        is_new: bool,
        replace: bool = False,
        steps: int | None = None,
        machine: dict[str, Any] | None = None,
    ) -> None:
        """Create the folder. Checkpoints and metrics of an earlier start stay unchanged until `open_metrics`.

        `is_new` is True if the run starts without a checkpoint. With `replace`, all files of an earlier run with this
        name are removed. `machine` comes from `machine_info`.
        """
        self.path = run_path(config.run)
        # until `open_metrics` keep the previous launch, because only a launch that has started resumes automatically
        launch = None if replace else last_launch(self.path)
        self._process = {**process_record(), "steps": steps, "machine": machine, "launch": launch}
        self._metrics_file: MetricsFile | None = None
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        """Functions that receive each record appended to the metrics."""
        with self._explain_write_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            for name in RUN_SUBDIRS:
                if replace or (is_new and name != CHECKPOINTS_DIR):
                    shutil.rmtree(self.path / name, ignore_errors=True)
            for name in ("summary.json", "report.html", *MARKERS):
                (self.path / name).unlink(missing_ok=True)
            (self.path / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
            self._write_process()

    def open_metrics(self, step: int, superseded: Sequence[Path]) -> list[Path]:
        """Open metrics.jsonl, and set aside the checkpoints that the run does not resume from, given newest first.

        The metrics of steps after `step` are removed, because these steps will be repeated. -1 removes all metrics.
        Return the new folders of the checkpoints.
        """
        with self._explain_write_errors():
            # Checkpoints are moved before metrics are removed, newest first. If the process dies in between, the next
            # start resumes from an older checkpoint, whose metrics still exist.
            moved = [abandon_checkpoint(folder) for folder in superseded]
            self._metrics_file = MetricsFile(self.path / METRICS_FILE, step)
            self._process["launch"] = launch_id()
            self._write_process()
        return moved

    def _write_process(self) -> None:
        partial = self.path / f"{PROCESS_FILE}.partial"
        partial.write_text(json.dumps(self._process) + "\n", encoding="utf-8")
        partial.replace(self.path / PROCESS_FILE)

    @contextmanager
    def _explain_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{error.filename or self.path}: cannot be written ({error.strerror}); fix that, or give run.dir "
                "another value",
                local_only=True,
            ) from None

    @property
    def _metrics(self) -> MetricsFile:
        assert self._metrics_file is not None, "call open_metrics() first"
        return self._metrics_file

    def roll_back(self, step: int) -> None:
        self._metrics.roll_back(step)

    def write_marker(self, marker: str, step: int, reason: str) -> None:
        self._write(marker, json.dumps({"step": step, "reason": reason}))

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl. It is passed to the operating system before the next step."""
        self._metrics.append(metrics)
        self._notify_listeners(metrics)

    def log_eval_loss(self, step: int, eval_loss: float) -> None:
        """Add the evaluation loss to the step's line in metrics.jsonl."""
        self._metrics.extend_step(step, {"eval_loss": eval_loss})
        self._notify_listeners({"step": step, "eval_loss": eval_loss})

    def eval_loss(self, step: int) -> float | None:
        """Return the evaluation loss of the last step from metrics.jsonl; None if it is missing."""
        value = self._metrics.last_value(step, "eval_loss")
        return value if isinstance(value, float) else None

    def values(self, key: str) -> list[float]:
        return self._metrics.values(key)

    def _notify_listeners(self, metrics: dict[str, Any]) -> None:
        for listener in self.listeners:
            listener(nonfinite_to_none(metrics))

    def close(self) -> None:
        """Write the remaining metrics and close the file."""
        if self._metrics_file is not None:
            self._metrics_file.close()

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write("summary.json", json.dumps(nonfinite_to_none(summary), indent=2))

    def _write(self, name: str, text: str) -> None:
        """Write a file at the end of a run. A full disk is reported, and does not damage files saved before."""
        partial = self.path / f"{name}.partial"
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self.path / name)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
                print(f"qlora-dist: {self.path / name}: cannot be written ({error.strerror})", file=sys.stderr)


def last_launch(path: Path) -> Any:
    """Return the launch (`launch_id`) that last started in a run's folder; None if it is unknown."""
    return read_json_object(path / PROCESS_FILE, must_be_readable=True).get("launch")


def finished_steps(path: Path) -> int | None:
    """Return the number of steps of a finished run; None if the run in the folder is not finished."""
    step = read_json_object(path / DONE_MARKER, must_be_readable=True).get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None
