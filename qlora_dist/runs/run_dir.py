"""The run's folder: its configuration, its metrics, its results. Written by rank 0."""

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
from qlora_dist.runs.metrics_file import MetricsFile, nonfinite_to_none
from qlora_dist.runtime.environment import launch_id, process_record

DONE_MARKER, REQUEUE_MARKER, STOPPED_MARKER = "DONE", "REQUEUE", "STOPPED"
"""The marker that a run leaves when it ends cleanly: at its last step; before it, to be started again by its launcher;
before it, by hand. Each holds {"step", "reason"}. Launchers hide exit codes, or make them up."""
MARKERS = (DONE_MARKER, REQUEUE_MARKER, STOPPED_MARKER)
PROCESS_FILE = "process.json"
"""Where rank 0 runs and on what (`machine`), how many steps it is going to do, and which launch has started it; for
those who look at the run from outside."""

METRICS_FILE, CONFIG_FILE = "metrics.jsonl", "config.yaml"
CHECKPOINTS_DIR = "checkpoints"
RUN_SUBDIRS = (CHECKPOINTS_DIR, "adapter", "tensorboard")
"""What a new run removes of an old one of its name."""


def run_path(config: RunConfig) -> Path:
    """Where the run's files go."""
    return Path(config.dir) / config.name


class RunDir:
    """The folder of a run that has begun."""

    def __init__(
        self,
        config: Config,
        is_new: bool,
        replace: bool = False,
        steps: int | None = None,
        machine: dict[str, Any] | None = None,
    ) -> None:
        """Make it. What an earlier start can go on from stays as it is until `start`.

        Args:
            config: of the run.
            is_new: the run starts from no checkpoint.
            replace: remove what an earlier run of that name has left.
            steps: when it is done.
            machine: what it computes on (`this_machine`).

        Raises:
            UserError: the folder cannot be written.
        """
        self.path = run_path(config.run)
        # until `start` it is the launch of the start before: only a launch that has started goes on by itself
        launch = None if replace else last_launch(self.path)
        self._process = {**process_record(), "steps": steps, "machine": machine, "launch": launch}
        self._metrics_file: MetricsFile | None = None
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        """Called with what is appended to the metrics."""
        with self._explain_write_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            for name in RUN_SUBDIRS:
                if replace or (is_new and name != CHECKPOINTS_DIR):
                    shutil.rmtree(self.path / name, ignore_errors=True)
            for name in ("summary.json", "report.html", *MARKERS):
                (self.path / name).unlink(missing_ok=True)
            (self.path / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
            self._write_process()

    def start(self, step: int, superseded: Sequence[Path]) -> list[Path]:
        """Begin to write. Until here an earlier start's checkpoints and metrics are as it left them.

        Args:
            step: steps that are done; the metrics of later ones are taken out, because they will be done again. -1:
                all are taken out.
            superseded: checkpoints that the run does not go on from, the newest first.

        Returns:
            Where those checkpoints are now.

        Raises:
            UserError: the folder cannot be written.
        """
        with self._explain_write_errors():
            # first these, newest first: a start that dies in between goes on from an older one, which has its metrics
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
                f"{error.filename or self.path}: cannot be written ({error.strerror}); mend that, or give run.dir "
                "another value",
                local_only=True,
            ) from None

    @property
    def _metrics(self) -> MetricsFile:
        assert self._metrics_file is not None, "start() comes first"
        return self._metrics_file

    def go_back(self, step: int) -> None:
        """Take out the metrics of steps after `step`."""
        self._metrics.go_back(step)

    def mark(self, marker: str, step: int, reason: str) -> None:
        """Leave a marker, whole or not at all."""
        self._write(marker, json.dumps({"step": step, "reason": reason}))

    def log(self, metrics: dict[str, Any]) -> None:
        """Append to metrics.jsonl; handed to the system before the next step."""
        self._metrics.append(metrics)
        self._notify_listeners(metrics)

    def log_eval_loss(self, step: int, eval_loss: float) -> None:
        """Add the held-out loss to the step's line in metrics.jsonl."""
        self._metrics.extend(step, {"eval_loss": eval_loss})
        self._notify_listeners({"step": step, "eval_loss": eval_loss})

    def eval_loss(self, step: int) -> float | None:
        """Return the held-out loss of the step that is done, if metrics.jsonl has it."""
        value = self._metrics.value(step, "eval_loss")
        return value if isinstance(value, float) else None

    def values(self, key: str) -> list[float]:
        """Return a number of each line that has it."""
        return self._metrics.values(key)

    def _notify_listeners(self, metrics: dict[str, Any]) -> None:
        for listener in self.listeners:
            listener(nonfinite_to_none(metrics))

    def close(self) -> None:
        """Write what is left of the metrics."""
        if self._metrics_file is not None:
            self._metrics_file.close()

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        self._write("summary.json", json.dumps(nonfinite_to_none(summary), indent=2))

    def _write(self, name: str, text: str) -> None:
        """Write a file at the end of a run. A full disk is said, and takes nothing from what was saved before."""
        partial = self.path / f"{name}.partial"
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self.path / name)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
                print(f"qlora-dist: {self.path / name}: cannot be written ({error.strerror})", file=sys.stderr)


def last_launch(path: Path) -> Any:
    """Return the launch (`launch_id`) that has last started in a run's folder; None: that is not known."""
    return _read_json(path / PROCESS_FILE).get("launch")


def finished_steps(path: Path) -> int | None:
    """Return the steps after which the run of a folder is done; None: it is not."""
    return _as_count(_read_json(path / DONE_MARKER).get("step"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _as_count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
