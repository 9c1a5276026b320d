"""Writing checkpoints beside the training.

A step waits for the copy off the device only. A thread of each rank writes that rank's file into a hidden folder and a
note of its size and sha256 beside it. How far they are is summed over the ranks along with each step's loss; when all
are done, a thread of rank 0 writes the manifest, renames the folder, and removes the oldest checkpoints. There is no
collective of its own, but where one is wanted before the last was done, and at the end.

A rank that cannot write (a full disk) says so; the others' files are then removed, and training goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from qlora_dist.checkpoint.manifest import (
    CHECKPOINT_MANIFEST,
    Manifest,
    abandon_checkpoint,
    file_sha256,
    find_written_checkpoints,
    fsync_folder,
    partial_folder,
    rank_file_name,
    read_manifest_if_complete,
    step_folder,
    write_and_fsync,
)
from qlora_dist.checkpoint.run_fingerprint import is_same_run
from qlora_dist.io.safetensors_file import SafetensorsWriter
from qlora_dist.runtime.threads import background_executor

_VISIBLE_S = 60.0
"""How long rank 0 waits for a file of another node to appear: NFS may remember for a minute that it was not there."""


class Checkpointer:
    """The checkpoints of a run. Every method is called on all ranks, in the same order."""

    def __init__(self, checkpoints: Path, keep: int, log: Callable[[str], None]) -> None:
        """Remove what an earlier process left half-written.

        Args:
            checkpoints: the folder of checkpoints, seen by all ranks.
            keep: how many complete ones of this run stay.
            log: for rank 0's lines.
        """
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._checkpoints, self._keep, self._say = checkpoints, keep, log
        self._thread = background_executor("checkpoint")
        self._own: Future[None] | None = None
        self._commit: Future[None] | None = None
        self._manifest: Manifest | None = None
        self._since = 0.0
        self.seconds = 0.0
        """What the last one took, from the copy to the rename; known to rank 0."""
        if self._rank == 0:
            for left in checkpoints.glob(".*.partial"):
                shutil.rmtree(left, ignore_errors=True)
        dist.barrier()

    def write(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        """Begin to write; waits for the one before, if that is not done.

        Args:
            manifest: without files; the same on all ranks.
            tensors: of this rank, on the CPU, not changed any more.
        """
        self.wait()
        self._manifest, self._since = manifest, time.perf_counter()
        self._own = self._thread.submit(self._write_own, self._folder(), dict(tensors))

    @property
    def progress(self) -> tuple[int, int]:
        """(1, 0) when this rank's file is written, (0, 1) when that has failed, else (0, 0)."""
        if self._own is None or not self._own.done():
            return 0, 0
        return (1, 0) if self._own.exception() is None else (0, 1)

    def update_status(self, written: int, failed: int) -> None:
        """Take note of the sums of `progress` over all ranks."""
        if self._own is None or written + failed < self._world_size:
            return
        error, self._own = self._own.exception(), None
        assert self._manifest is not None
        if failed:
            if error is not None:
                self._report_failure(error)
            if self._rank == 0:
                self._thread.submit(shutil.rmtree, self._folder(), ignore_errors=True)
        elif self._rank == 0:
            self._commit = self._thread.submit(self._complete, self._manifest, self._folder())

    def wait(self) -> None:
        """Until nothing is being written: the last checkpoint is complete, or known to have failed."""
        if self._own is not None:
            self._own.exception()  # waits
            sums = torch.tensor(self.progress)
            dist.all_reduce(sums)
            self.update_status(*sums.tolist())
        if self._commit is not None:
            error, self._commit = self._commit.exception(), None
            if error is not None:
                self._report_failure(error)

    def close(self) -> None:
        """Wait for the last one, on all ranks until rank 0 has renamed it."""
        self.wait()
        dist.barrier()
        self._thread.shutdown()

    def _folder(self) -> Path:
        assert self._manifest is not None
        return partial_folder(step_folder(self._checkpoints, self._manifest.step))

    def _write_own(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / rank_file_name(self._rank)
        try:
            writer = SafetensorsWriter(path, [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.close()
            write_and_fsync(_rank_note_path(path), json.dumps([path.stat().st_size, file_sha256(path)]).encode())
        except OSError:
            for left in folder.glob(f"{path.stem}.*"):  # at once: the run's other files want the room too
                left.unlink(missing_ok=True)
            raise

    def _complete(self, manifest: Manifest, folder: Path) -> None:
        """Rank 0, when all files are there."""
        files = {}
        for rank in range(self._world_size):
            path = folder / rank_file_name(rank)
            nbytes, sha256 = json.loads(_read_when_visible(_rank_note_path(path)))
            files[path.name] = nbytes, sha256
        for rank in range(self._world_size):
            _rank_note_path(folder / rank_file_name(rank)).unlink()
        write_and_fsync(folder / CHECKPOINT_MANIFEST, replace(manifest, files=files).to_bytes())
        fsync_folder(folder)
        final = step_folder(self._checkpoints, manifest.step)
        if os.path.lexists(final):
            abandon_checkpoint(final)  # a damaged one that the run went back behind, or a stranger's
        folder.rename(final)
        fsync_folder(self._checkpoints)
        self.seconds = time.perf_counter() - self._since
        nbytes = sum(size for size, _ in files.values())
        self._say(f"checkpoint after {manifest.step} steps: {nbytes / 2**20:.1f} MiB in {self.seconds:.1f} s")
        for old in self._checkpoints_of_run(manifest)[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _checkpoints_of_run(self, newest: Manifest) -> list[Path]:
        """Return this run's checkpoints up to the newest, newest first. What lies beside them is left alone."""
        return [
            folder
            for folder in find_written_checkpoints(self._checkpoints)
            if (found := read_manifest_if_complete(folder)) is not None
            and found.step <= newest.step
            and is_same_run(found.identity, newest.identity, folder)
        ]

    def _report_failure(self, error: BaseException) -> None:
        assert self._manifest is not None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        print(  # not in rank 0's voice: this is the rank that knows
            f"qlora-dist: [rank {self._rank}] the checkpoint after {self._manifest.step} steps could not be written to "
            f"{self._checkpoints} ({reason}); training goes on, the one before stays",
            file=sys.stderr,
            flush=True,
        )


def _rank_note_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_when_visible(path: Path) -> str:
    end = time.monotonic() + _VISIBLE_S
    while True:
        try:
            return path.read_text()
        except FileNotFoundError:
            if time.monotonic() > end:
                raise OSError(f"rank 0 does not see {path.name}: run.dir must be seen by all nodes") from None
            time.sleep(0.2)
