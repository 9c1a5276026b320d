"""Metrics for TensorBoard, Weights & Biases and MLflow. Off unless asked for.

`accelerate.tracking` has the same three, but its trackers ask for accelerate's own state of the processes.
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
"""In the run's folder: under which ids the run is known, so that it goes on there."""


@dataclass(frozen=True)
class Tracker:
    """One that is open."""

    log: Callable[[dict[str, float], int], Any]
    """Numbers of a step."""
    close: Callable[[], Any]


def check_trackers(config: Config) -> None:
    """See whether they are installed, before a model is loaded.

    Raises:
        UserError: one is not.
    """
    for name in config.run.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"run.trackers: {name} is not installed; pip install {name}, or take it out of the list")


@contextmanager
def open_trackers(
    config: Config, path: Path, is_new: bool, say: Callable[[str], None]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open what the configuration names, and close it at the end, whatever that is.

    None of them ends a run: one that fails is left out from then on.

    Args:
        config: of the run.
        path: its folder.
        is_new: the run begins; else it goes on where it was known.
        say: for what goes wrong.

    Returns:
        What takes a line of metrics.jsonl, and hands on its numbers; those within are named as `paging.hits`.
    """
    opened: dict[str, Tracker] = {}
    ids = {} if is_new else read_json_object(path / _IDS_FILE)

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # a library of others, and a network: nothing that a run should end for
            opened.pop(name, None)
            say(f"{name}: {type(error).__name__}: {error}; the run goes on without it, metrics.jsonl has all")

    def log_metrics(metrics: dict[str, Any]) -> None:
        numbers = {key: value for key, value in flatten_keys(metrics).items() if isinstance(value, (int, float))}
        step = int(numbers.pop("step"))
        for name, tracker in list(opened.items()):
            attempt(name, partial(tracker.log, numbers, step))

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
    if "mlflow" not in ids:  # parameters cannot be changed later
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
