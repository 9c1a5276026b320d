"""Metrics for TensorBoard, Weights & Biases and MLflow, if `run.trackers` names them.

`accelerate.tracking` has these three, too, but its trackers need accelerate's process state.
"""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qlora_dist.config.config_file import flatten_keys
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.runs.json_object import read_json_object

_IDS_FILE = "trackers.json"
"""File in the run's folder with its id in each tracker, so that a resumed run continues there."""


@dataclass(frozen=True)
class Tracker:
    """Tracker that is open."""

    log_metrics: Callable[[dict[str, float], int], Any]
    """Function that logs the numbers of a step."""
    close: Callable[[], Any]
    """Function that ends the record."""


def check_trackers(config: Config) -> None:
    """Raise UserError if a tracker is not installed, before a model is loaded."""
    for name in config.run.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"run.trackers: {name} is not installed; pip install {name}, or take it out of the list")


@contextmanager
def open_trackers(
    config: Config, path: Path, log: Callable[[str], None], *, is_new: bool
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the trackers that the configuration names, and close them at the end, also after an error.

    A tracker that fails is left out from then on, and the run continues. Unless the run `is_new`, its records in the
    trackers are continued.

    Yields:
        A function that sends one metrics record to every tracker. Nested keys are joined with a dot: `paging.hits`.
    """
    opened: dict[str, Tracker] = {}
    ids = {} if is_new else read_json_object(path / _IDS_FILE)

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # libraries and networks fail in many ways, none of which should end a run
            opened.pop(name, None)
            log(f"{name}: {type(error).__name__}: {error}; the run continues without it, and metrics.jsonl has all")

    def log_metrics(metrics: dict[str, Any]) -> None:
        numbers = {key: value for key, value in flatten_keys(metrics).items() if isinstance(value, (int, float))}
        step = int(numbers.pop("step"))
        for name, tracker in list(opened.items()):
            attempt(name, partial(tracker.log_metrics, numbers, step))

    for tracker_name in config.run.trackers:
        tracker = attempt(tracker_name, partial(_TRACKER_FACTORIES[tracker_name], config, path, ids))
        if tracker is not None:
            opened[tracker_name] = tracker
    if ids:
        with suppress(OSError):
            (path / _IDS_FILE).write_text(json.dumps(ids) + "\n", encoding="utf-8")
    try:
        yield log_metrics
    finally:
        for name, tracker in list(opened.items()):
            attempt(name, tracker.close)


def _tensorboard(config: Config, path: Path, ids: dict[str, str]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(path / "tensorboard"))
    writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in _settings(config).items()))

    def log(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key.replace(".", "/"), value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _wandb(config: Config, path: Path, ids: dict[str, str]) -> Tracker:
    import wandb

    ids.setdefault("wandb", uuid.uuid4().hex)
    run = wandb.init(
        project=config.run.project,
        name=config.run.name,
        dir=str(path),
        id=ids["wandb"],
        resume="allow",
        config=_settings(config),
    )
    return Tracker(lambda numbers, step: run.log(numbers, step=step), run.finish)


def _mlflow(config: Config, path: Path, ids: dict[str, str]) -> Tracker:
    import mlflow

    mlflow.set_experiment(config.run.project)
    run = mlflow.start_run(run_id=ids.get("mlflow"), run_name=config.run.name)
    if "mlflow" not in ids:  # parameters can be set only once
        mlflow.log_params(_settings(config))
    ids["mlflow"] = run.info.run_id
    return Tracker(lambda numbers, step: mlflow.log_metrics(numbers, step=step), mlflow.end_run)


_TRACKER_FACTORIES: dict[str, Callable[[Config, Path, dict[str, str]], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def _settings(config: Config) -> dict[str, str]:
    return {key: str(value) for key, value in flatten_keys(config.model_dump(mode="json")).items()}
