"""A run's checkpoints: the one it starts from, those it writes, and rollbacks to them."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError

from qlora_dist.adapters.attach import named_trainable_parameters
from qlora_dist.checkpoint.checkpointer import Checkpointer
from qlora_dist.checkpoint.manifest import (
    CHECKPOINT_MANIFEST,
    DamagedCheckpointError,
    Manifest,
    file_sha256,
    find_written_checkpoints,
    folder_step,
)
from qlora_dist.checkpoint.run_fingerprint import base_fingerprint, compare_fingerprints, run_fingerprint
from qlora_dist.checkpoint.select import latest_complete, verify_checkpoint
from qlora_dist.checkpoint.snapshot import TrainableState, restore, snapshot
from qlora_dist.errors import UserError
from qlora_dist.io.adapter_files import ADAPTER_WEIGHTS_NAME
from qlora_dist.optim.loss_scale import LossScale
from qlora_dist.runs.run_action import RunAction, choose_run_action
from qlora_dist.runs.run_dir import CHECKPOINTS_DIR, RunDir, run_path
from qlora_dist.runtime.object_collectives import broadcast_json
from qlora_dist.train.console import RunConsole, pluralize
from qlora_dist.train.run_progress import RunProgress
from qlora_dist.train.run_setup import RunSetup

_LATER_COUNTERS = {"evaluated", "wall_s"}
"""Counters that were added to `RunProgress` later, so that older checkpoints lack them."""


@dataclass(frozen=True)
class ResumePoint:
    """Checkpoint that a run starts from, or its beginning."""

    fingerprint: dict[str, Any]
    """Fingerprint of the run that every checkpoint records."""
    folder: Path | None
    """Folder of the checkpoint; None: the run starts at the beginning."""
    manifest: Manifest | None
    """Manifest of the checkpoint."""
    replaces_run: bool = False
    """True if the run replaces another one, whose files are all removed."""

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.manifest.step if self.manifest is not None else 0


def find_resume_point(setup: RunSetup, resume: str, console: RunConsole) -> ResumePoint:
    """Find the checkpoint that a run starts from, before any weight is read. Called on all ranks.

    Raises:
        UserError: the checkpoint belongs to another run, or is beyond this run's last step.
    """
    config, run = setup.config, run_path(setup.config.run)
    # rank 0 decides, because other nodes may see an older state of the folder
    action = RunAction(**broadcast_json(choose_run_action(config, resume).to_json() if setup.ranks.rank == 0 else None))
    base = broadcast_json(base_fingerprint(setup.folder.path) if setup.ranks.rank == 0 else None)
    initial = config.lora.from_adapter
    weights = None if initial is None else Path(initial) / ADAPTER_WEIGHTS_NAME
    adapter = broadcast_json(file_sha256(weights) if weights is not None and setup.ranks.rank == 0 else None)
    fingerprint = run_fingerprint(config, base, setup.data_sha256["train"], adapter)
    if action.note is not None:
        console.say(action.note)
    replaces, named = action.kind == "replace", action.resume not in ("auto", "none")
    if not named and action.kind in ("begin", "replace"):
        return ResumePoint(fingerprint, None, None, replaces)
    if named:
        folder, manifest = Path(action.resume), verify_checkpoint(Path(action.resume), _check_counters)
    else:
        newest = latest_complete(run / CHECKPOINTS_DIR, console.say, _check_counters)
        if newest is None:
            return ResumePoint(fingerprint, None, None)
        folder, manifest = newest
    for line in compare_fingerprints(manifest.identity, fingerprint, folder):
        console.say(line)
    if manifest.step > setup.steps:
        raise UserError(
            f"{folder}: was written after {manifest.step} steps, and this run has {setup.steps}; raise train.steps, or "
            "give an earlier checkpoint with --resume"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in named_trainable_parameters(setup.model)}
    if {name: cut.shape for name, cut in manifest.cuts.items()} != shapes:
        raise UserError(
            f"{folder}: its adapters have other names or shapes than this run's; give another checkpoint with --resume"
        )
    console.say(
        f"resumes after {manifest.step} steps, from {folder} (written by {pluralize(manifest.world_size, 'rank')})"
    )
    return ResumePoint(fingerprint, folder, manifest, replaces and not _is_within(folder, run))


def _is_within(folder: Path, run: Path) -> bool:
    """Return whether a checkpoint belongs to the run's folder, whose `checkpoints` may be a link to another disk."""
    return any(folder.resolve().is_relative_to(place.resolve()) for place in (run, run / CHECKPOINTS_DIR))


def _check_counters(manifest: Manifest) -> None:
    """Raise DamagedCheckpointError if the counters do not fit `RunProgress`, or contradict the manifest."""
    saved = manifest.state["progress"]
    required = {counter.name for counter in fields(RunProgress)} - _LATER_COUNTERS
    if missing := sorted(required - saved.keys()):
        raise DamagedCheckpointError(f"{CHECKPOINT_MANIFEST} lacks the counter {missing[0]}")
    try:
        loss = {"loss": float("nan") if saved["loss"] is None else saved["loss"]}
        progress = TypeAdapter(RunProgress).validate_json(json.dumps({**saved, **loss}), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DamagedCheckpointError(
            f"{CHECKPOINT_MANIFEST} is not one of a checkpoint: state.progress.{place}: {first['msg']}"
        ) from None
    counters = (progress.optimizer_steps, progress.tokens, progress.skipped_steps, progress.skipped_in_a_row)
    if (
        progress.step != manifest.step
        or min(*counters, *progress.left_out, 0) < 0
        or progress.optimizer_steps != manifest.state["optimizer_steps"]
        or progress.optimizer_steps > progress.step
    ):
        raise DamagedCheckpointError(f"{CHECKPOINT_MANIFEST} has counters that contradict each other")


class RunCheckpointer(Checkpointer):
    """Writer and reader of a run's checkpoints. Methods are called on all ranks."""

    def __init__(
        self,
        setup: RunSetup,
        resume_point: ResumePoint,
        state: TrainableState,
        loss_scale: LossScale,
        console: RunConsole,
    ) -> None:
        self._path = run_path(setup.config.run) / CHECKPOINTS_DIR
        super().__init__(self._path, setup.config.train.keep_checkpoints, console.say)
        self._resume_point, self._state, self._loss_scale, self._log = resume_point, state, loss_scale, console.say

    def resume(self, run_dir: RunDir | None) -> RunProgress:
        """Restore the checkpoint that the run starts from, if there is one.

        Once all ranks have restored it, other checkpoints are set aside, and metrics of later steps are removed. A
        start that fails earlier leaves everything unchanged.
        """
        folder, manifest = self._resume_point.folder, self._resume_point.manifest
        progress = RunProgress() if manifest is None or folder is None else self._restore(folder, manifest)
        dist.barrier()
        if run_dir is not None:
            own = folder is not None and _is_within(folder, run_dir.path)
            moved = run_dir.open_metrics(
                progress.step if own else -1, self._superseded(folder if own else None, progress.step)
            )
            if moved:
                names = ", ".join(path.name for path in reversed(moved))
                self._log(f"checkpoints that this run does not resume from are now in {moved[0].parent}: {names}")
        return progress

    def _superseded(self, folder: Path | None, step: int) -> list[Path]:
        """Return the run's checkpoints that are not older than `folder`, newest first; all of them if it is None."""
        checkpoints = find_written_checkpoints(self._path)
        if folder is None:
            return checkpoints
        start = folder.resolve()
        return [path for path in checkpoints if folder_step(path) >= step and path.resolve() != start]

    def save(self, progress: RunProgress) -> None:
        """Begin to write a checkpoint of the current state."""
        state = {
            "progress": progress.to_json(),
            "optimizer_steps": progress.optimizer_steps,
            "optimizer_bits": self._state.optimizer.optimizer_state.bits,
            "loss_scale": self._loss_scale.state(),
        }
        manifest = Manifest(
            step=progress.step,
            world_size=self._world_size,
            cuts=self._state.shard_specs,
            state=state,
            identity=self._resume_point.fingerprint,
        )
        self.write(manifest, snapshot(self._state))

    def roll_back(self, progress: RunProgress, skip_batch: int) -> RunProgress | None:
        """Restore the newest checkpoint, if any, and leave out global batch `skip_batch` from now on."""
        self.wait()
        newest = latest_complete(self._path, self._log, _check_counters)
        if newest is None:
            return None
        restored = self._restore(*newest)
        restored.left_out = sorted({*restored.left_out, *progress.left_out, skip_batch})
        self._log(f"rolls back to {newest[0]} and leaves out global batch {skip_batch}")
        return restored

    def _restore(self, folder: Path, manifest: Manifest) -> RunProgress:
        saved, now = manifest.optimizer_bits, self._state.optimizer.optimizer_state.bits
        if saved != now:
            self._log(
                f"{folder}: the optimizer states are converted from {saved} to {now} bit, which changes later losses"
            )
        restore(self._state, manifest, folder)
        self._loss_scale.load(manifest.state["loss_scale"])
        return RunProgress.from_json(manifest.state["progress"])
