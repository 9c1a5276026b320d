"""A run's checkpoints: where it starts from, what it writes, how it goes back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.checkpoint.choose import newest_whole, whole
from qlora_dist.checkpoint.identity import base_fingerprint, compare, identity_of
from qlora_dist.checkpoint.manifest import Manifest
from qlora_dist.checkpoint.snapshot import Trained, restore, snapshot
from qlora_dist.checkpoint.writer import Checkpointer
from qlora_dist.errors import UserError
from qlora_dist.optim.loss_scale import LossScale
from qlora_dist.parallel.exchange import broadcast_json
from qlora_dist.train.console import RunConsole
from qlora_dist.train.first_adapter import adapter_sha256
from qlora_dist.train.progress import Progress
from qlora_dist.train.run_dir import REQUEUE, run_path
from qlora_dist.train.setup import Setup


@dataclass(frozen=True)
class Start:
    """Where a run starts."""

    identity: dict[str, Any]
    folder: Path | None
    """None: at the beginning."""
    manifest: Manifest | None

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.manifest.step if self.manifest is not None else 0


def find_start(setup: Setup, resume: str, console: RunConsole) -> Start:
    """Where a run starts, before any weight is read. Called on all ranks.

    Args:
        setup: the run.
        resume: `auto`, `none`, or a checkpoint's folder.
        console: for what is passed over, and what has changed.

    Raises:
        UserError: the checkpoint belongs to another run, or the run is at its end.
    """
    config, run = setup.config, run_path(setup.config.run)
    # an overwriting command that its launcher repeats goes on with what it has begun itself
    again = setup.ranks.restarts > 0 or (run / REQUEUE).exists()
    fresh = resume == "none" or (resume == "auto" and config.run.overwrite and not again)
    fresh = broadcast_json(fresh)
    base = broadcast_json(base_fingerprint(setup.folder.path) if setup.ranks.rank == 0 else None)
    first = config.lora.from_adapter
    adapter = broadcast_json(adapter_sha256(Path(first)) if first is not None and setup.ranks.rank == 0 else None)
    identity = identity_of(config, base, setup.data_sha256["train"], adapter)
    if fresh:
        return Start(identity, None, None)
    if resume == "auto":
        found = newest_whole(run / "checkpoints", console.say)
        if found is None:
            return Start(identity, None, None)
        folder, manifest = found
    else:
        folder, manifest = Path(resume), whole(Path(resume))
    for line in compare(manifest.identity, identity, folder):
        console.say(line)
    if manifest.step > setup.steps:
        raise UserError(
            f"{folder}: is after {manifest.step} steps, and this run has {setup.steps}; raise train.steps, or give an "
            "earlier checkpoint with --resume"
        )
    console.say(f"goes on after {manifest.step} steps, from {folder} ({manifest.world_size} ranks wrote it)")
    return Start(identity, folder, manifest)


class Checkpoints(Checkpointer):
    """Those of a run: the writer, and what goes into it and out of it again. Methods are called on all ranks."""

    def __init__(self, setup: Setup, start: Start, state: Trained, loss_scale: LossScale, console: RunConsole) -> None:
        self._path = run_path(setup.config.run) / "checkpoints"
        super().__init__(self._path, setup.config.train.keep_checkpoints, console.say)
        self._start, self._state, self._loss_scale, self._say = start, state, loss_scale, console.say

    def start(self) -> Progress:
        """Take over the checkpoint that the run starts from, if there is one."""
        if self._start.manifest is None or self._start.folder is None:
            return Progress()
        return self._restore(self._start.folder, self._start.manifest)

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint of this moment."""
        state = {
            "progress": progress.to_json(),
            "optimizer_steps": progress.optimizer_steps,
            "optimizer_bits": self._state.optimizer.moments.bits,
            "loss_scale": self._loss_scale.state(),
        }
        manifest = Manifest(progress.step, self._world_size, self._state.cuts, state, self._start.identity)
        self.write(manifest, snapshot(self._state))

    def go_back(self, progress: Progress, leave_out: int) -> Progress | None:
        """To the last checkpoint, and never to global batch `leave_out` again; None: there is no checkpoint."""
        self.wait()
        found = newest_whole(self._path, self._say)
        if found is None:
            return None
        before = self._restore(*found)
        before.left_out = sorted({*before.left_out, *progress.left_out, leave_out})
        self._say(f"goes back to {found[0]}, and leaves out global batch {leave_out}")
        return before

    def _restore(self, folder: Path, manifest: Manifest) -> Progress:
        saved, now = manifest.state.get("optimizer_bits", 32), self._state.optimizer.moments.bits
        if saved != now:
            self._say(f"{folder}: the optimizer's moments go from {saved} to {now} bit; losses will not be the same")
        restore(self._state, manifest, folder)
        self._loss_scale.load(manifest.state["loss_scale"])
        return Progress.from_json(manifest.state["progress"])
