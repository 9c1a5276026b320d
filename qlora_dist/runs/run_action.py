"""Action of a command in its run's folder: begin, replace, resume or nothing.

Every rank decides it before any rank waits for another. This module does not import torch, because `launch` uses it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.config.sections import DEFAULT_STEPS
from qlora_dist.errors import UserError
from qlora_dist.runs.run_dir import (
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    DONE_MARKER,
    METRICS_FILE,
    finished_steps,
    last_launch,
    run_path,
)
from qlora_dist.runs.run_dir_check import check_run_dir
from qlora_dist.runtime.environment import is_same_launch, launch_id

_IGNORED_SECTIONS = ("parallel", "paging", "run")
_IGNORED_KEYS_BY_SECTION = {
    "data": ("cache", "workers"),
    "train": (
        "micro_batch",
        "compile",
        "eval_every",
        "save_every",
        "keep_checkpoints",
        "max_time",
        "timeout",
        "device",
    ),
}
"""Keys that a repeated command may change without making a finished run another training."""


@dataclass(frozen=True)
class RunAction:
    """Action of a command in the folder of its run."""

    kind: Literal["begin", "replace", "resume", "done"]
    """Kind of action. begin: start a run; replace: remove the run in the folder first; resume: continue from a
    checkpoint; done: do nothing."""
    resume: str = "auto"
    """Folder of the checkpoint, or auto for the newest one."""
    note: str | None = None
    """Message for the user."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_run_action(config: Config, resume: str = "auto") -> RunAction:
    """Decide what this command does in the run's folder, without changing anything.

    When a launcher restarts its command, the run continues, whatever `run.overwrite` and `resume` say. They apply to
    the first start. `resume` is `auto`, `none`, or the folder of a checkpoint.

    Raises:
        UserError: the folder cannot be used, or holds a run that this command would destroy.
    """
    path = run_path(config.run)
    try:
        check_run_dir(path)
        return _choose_run_action(config, resume, path)
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be used ({error.strerror}); fix that, or give run.name another value"
        ) from None


def _choose_run_action(config: Config, resume: str, path: Path) -> RunAction:
    has_checkpoint = any((path / CHECKPOINTS_DIR).glob("step-*/manifest.json"))
    if is_same_launch(last_launch(path), launch_id()):
        resume = "auto" if has_checkpoint or resume == "none" else resume
    elif config.run.overwrite:
        first = config.lora.from_adapter
        if first is not None and Path(first).resolve().is_relative_to(path.resolve()):
            raise UserError(
                f"lora.from: {first} lies in the folder of this run, which run.overwrite=true replaces; give run.name "
                "another value"
            )
        return RunAction("replace", resume)
    other = "give run.name another value, or run.overwrite=true to replace it"
    done = finished_steps(path)
    if done is not None:
        if _is_same_training(path, config):
            note = (
                f"{path}: is done after {done} steps, and there is nothing to do; for more, raise train.steps, or give "
            )
            return RunAction("done", note=f"{note}run.overwrite=true to start it again")
        requested_steps = config.train.steps or (DEFAULT_STEPS if config.train.epochs is None else None)
        if resume != "none" and (requested_steps is None or requested_steps > done):
            return RunAction("resume", resume)
        raise UserError(f"{path}: holds a run that is finished after {done} steps; raise train.steps, {other}")
    has_adapter = (path / "adapter").exists()
    if resume == "none" and (has_checkpoint or has_adapter):
        raise UserError(f"{path}: holds a run already; {other}")
    if has_checkpoint or resume not in ("auto", "none"):
        return RunAction("resume", resume)
    # metrics without a configuration are another program's file, not a failed run
    is_foreign = (path / METRICS_FILE).exists() and not (path / CONFIG_FILE).exists()
    if has_adapter or is_foreign:
        raise UserError(f"{path}: holds a run already; {other}")
    return RunAction("begin", note=_lost_steps_note(path, config))


def finished_run_note(config: Config) -> str | None:
    """Return the message about a run that is done; None if there is something to do."""
    action = choose_run_action(config)
    return action.note if action.kind == "done" else None


def dry_run_note(config: Config, resume: str) -> str | None:
    """Return a message on what `train` would do with the run in the folder; None if the folder holds no run."""
    action = choose_run_action(config, resume)
    path = run_path(config.run)
    if action.kind == "done":
        return f"train would do nothing: {action.note}"
    if action.kind == "replace":
        return f"train would replace the run in {path}" if (path / METRICS_FILE).exists() else None
    if action.kind == "resume":
        return f"train would resume the run in {path}"
    return action.note


def skip_if_finished(config: Config, resume: str, rank: int) -> bool:
    """Return whether the run is done. Rank 0 prints the message. Every rank decides alone and waits for no other."""
    action = choose_run_action(config, resume)
    if action.kind != "done":
        return False
    if rank == 0:
        with suppress(OSError):
            os.utime(run_path(config.run) / DONE_MARKER)  # a job script ignores markers older than its own start
        print(action.note, flush=True)
    return True


def _lost_steps_note(path: Path, config: Config) -> str | None:
    """Return a message if beginning anew loses steps of a run with another configuration; otherwise None."""
    try:
        steps = (path / METRICS_FILE).read_bytes().count(b'"loss"')
    except FileNotFoundError:
        return None
    if not steps or _is_same_training(path, config):
        return None
    return (
        f"{path}: held {steps} steps of a run with another configuration, which wrote no checkpoint; this run begins "
        "in its place"
    )


def _is_same_training(path: Path, config: Config) -> bool:
    """Return whether the run's configuration is this one, apart from keys that do not change the adapter."""
    try:
        saved = load_config(path / CONFIG_FILE)
    except UserError:
        return False
    return _training_settings(saved) == _training_settings(config)


def _training_settings(config: Config) -> dict[str, dict[str, Any]]:
    tree = config.model_dump(mode="json")
    return {
        section: {key: value for key, value in keys.items() if key not in _IGNORED_KEYS_BY_SECTION.get(section, ())}
        for section, keys in tree.items()
        if section not in _IGNORED_SECTIONS
    }
