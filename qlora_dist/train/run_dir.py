"""The run's folder: its configuration, its metrics, its results. Written by rank 0."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_dist.config import Config, RunConfig
from qlora_dist.config_file import dump_config
from qlora_dist.errors import UserError
from qlora_dist.launch.environment import this_process
from qlora_dist.train.metrics_file import MetricsFile, finite

DONE, REQUEUE, STOPPED = "DONE", "REQUEUE", "STOPPED"
"""The marker that a run leaves when it ends cleanly: at its last step; before it, to be started again by its launcher;
before it, by hand. Each holds {"step", "reason"}. Launchers hide exit codes, or make them up."""
MARKERS = (DONE, REQUEUE, STOPPED)
PROCESS_FILE = "process.json"
"""Where rank 0 runs and on what (`machine`), and how many steps it is going to do; for those who look at the run from
outside."""

_REPLACED = ("adapter", "checkpoints", "tensorboard")
"""What a new run removes of an old one of its name."""


def run_path(config: RunConfig) -> Path:
    """Where the run's files go."""
    return Path(config.dir) / config.name


def check_run_dir(config: Config, resume: str = "auto") -> None:
    """Refuse a name that is taken by a run that this one does not go on with.

    Args:
        config: of the run.
        resume: `auto`, `none`, or a checkpoint's folder.

    Raises:
        UserError: the folder holds a finished run, or one that this one would destroy.
    """
    path = run_path(config.run)
    if config.run.overwrite:
        return
    other = "give run.name another value, or run.overwrite=true to replace it"
    done_steps = _done_steps(path)
    if resume != "none" and done_steps is not None:
        if config.train.steps is None or config.train.steps > done_steps:
            return  # goes on where it ended
        raise UserError(f"{path}: holds a run that is finished after {done_steps} steps; raise train.steps, {other}")
    has_checkpoint = any((path / "checkpoints").glob("step-*"))
    stopped = any((path / marker).exists() for marker in (REQUEUE, STOPPED))
    begun = not (path / "adapter").exists() and (stopped or _same_config(path, config))
    if resume != "none" and (has_checkpoint or begun):
        return
    if any((path / name).exists() for name in ("metrics.jsonl", *_REPLACED)):
        raise UserError(f"{path}: holds a run already; {other}")


def _done_steps(path: Path) -> int | None:
    try:
        return int(json.loads((path / DONE).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _same_config(path: Path, config: Config) -> bool:
    """Whether a run that left nothing but its beginning was one of this configuration."""
    try:
        return (path / "config.yaml").read_text(encoding="utf-8") == dump_config(config)
    except (OSError, UnicodeDecodeError):
        return False


class RunDir:
    """The folder of a run that has begun."""

    def __init__(
        self, config: Config, step: int, fresh: bool, steps: int | None = None, machine: dict[str, Any] | None = None
    ) -> None:
        """Make it.

        Args:
            config: of the run.
            step: steps that are done; the metrics of later ones are taken out, because they will be done again.
            fresh: remove what an earlier run of that name has left.
            steps: when it is done.
            machine: what it computes on (`this_machine`).
        """
        self.path = run_path(config.run)
        self.path.mkdir(parents=True, exist_ok=True)
        if fresh:
            for name in _REPLACED:
                shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("summary.json", "report.html", *MARKERS):
            (self.path / name).unlink(missing_ok=True)
        (self.path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        process = {**this_process(), "steps": steps, "machine": machine}
        (self.path / PROCESS_FILE).write_text(json.dumps(process) + "\n", encoding="utf-8")
        self._metrics = MetricsFile(self.path / "metrics.jsonl", -1 if fresh else step)
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        """Called with what is appended to the metrics."""

    def go_back(self, step: int) -> None:
        """Take out the metrics of steps after `step`."""
        self._metrics.go_back(step)

    def mark(self, marker: str, step: int, reason: str) -> None:
        """Leave a marker."""
        (self.path / marker).write_text(json.dumps({"step": step, "reason": reason}) + "\n", encoding="utf-8")

    def log(self, metrics: dict[str, Any]) -> None:
        """Append to metrics.jsonl; handed to the system before the next step."""
        self._metrics.append(metrics)
        self._tell(metrics)

    def log_eval_loss(self, step: int, eval_loss: float) -> None:
        """Add the held-out loss to the step's line in metrics.jsonl."""
        self._metrics.extend(step, {"eval_loss": eval_loss})
        self._tell({"step": step, "eval_loss": eval_loss})

    def eval_loss(self, step: int) -> float | None:
        """Return the held-out loss of the step that is done, if metrics.jsonl has it."""
        value = self._metrics.value(step, "eval_loss")
        return value if isinstance(value, float) else None

    def values(self, key: str) -> list[float]:
        """Return a number of each line that has it."""
        return self._metrics.values(key)

    def _tell(self, metrics: dict[str, Any]) -> None:
        for listener in self.listeners:
            listener(finite(metrics))

    def close(self) -> None:
        """Write what is left of the metrics."""
        self._metrics.close()

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        (self.path / "summary.json").write_text(json.dumps(finite(summary), indent=2) + "\n", encoding="utf-8")
