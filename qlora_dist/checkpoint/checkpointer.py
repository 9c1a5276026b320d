"""Checkpoints written during training.

A step waits only for the copy from the device. A thread of each rank writes the rank's file into a hidden folder, and
its size and sha256 into a note beside it. Each step's collective sums the ranks' status along with the loss. When all
ranks have written, a thread of rank 0 writes the manifest, renames the folder, and removes the oldest checkpoints.
Separate collectives run only at the end, and if a checkpoint begins before the previous one is complete.

A rank that cannot write, because its disk is full, reports it. Then the other ranks' files are removed, and training
continues.
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
"""Seconds that rank 0 waits for another node's file, because NFS may cache for a minute that it does not exist."""


class Checkpointer:
    """The checkpoints of a run. All ranks call every method, in the same order.

    The constructor removes the incomplete checkpoints of earlier processes. `keep` is the number of this run's complete
    checkpoints to keep, and `log` prints rank 0's lines.
    """

    def __init__(self, checkpoints: Path, keep: int, log: Callable[[str], None]) -> None:
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._checkpoints, self._keep, self._log = checkpoints, keep, log
        self._thread = background_executor("checkpoint")
        self._rank_write: Future[None] | None = None
        self._commit: Future[None] | None = None
        self._manifest: Manifest | None = None
        self._started = 0.0
        self.seconds = 0.0
        """Seconds that the last checkpoint took, from the copy to the rename; set on rank 0 only."""
        if self._rank == 0:
            for partial in checkpoints.glob(".*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()

    def write(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        """Begin to write a checkpoint, after the previous one is complete.

        All ranks give the same manifest, without files. The tensors are on the CPU, and must not change afterwards.
        """
        self.wait()
        self._manifest, self._started = manifest, time.perf_counter()
        self._rank_write = self._thread.submit(self._write_rank_file, self._folder(), dict(tensors))

    @property
    def progress(self) -> tuple[int, int]:
        """Status of this rank's file: (1, 0) if it is written, (0, 1) if writing failed, else (0, 0)."""
        if self._rank_write is None or not self._rank_write.done():
            return 0, 0
        return (1, 0) if self._rank_write.exception() is None else (0, 1)

    def update_status(self, written: int, failed: int) -> None:
        """Complete or drop the checkpoint, given the sums of `progress` over all ranks."""
        if self._rank_write is None or written + failed < self._world_size:
            return
        error, self._rank_write = self._rank_write.exception(), None
        assert self._manifest is not None
        if failed:
            if error is not None:
                self._report_failure(error)
            if self._rank == 0:
                self._thread.submit(shutil.rmtree, self._folder(), ignore_errors=True)
        elif self._rank == 0:
            self._commit = self._thread.submit(self._commit_checkpoint, self._manifest, self._folder())

    def wait(self) -> None:
        """Wait until the last checkpoint is complete or has failed."""
        if self._rank_write is not None:
            self._rank_write.exception()  # waits
            sums = torch.tensor(self.progress)
            dist.all_reduce(sums)
            self.update_status(*sums.tolist())
        if self._commit is not None:
            error, self._commit = self._commit.exception(), None
            if error is not None:
                self._report_failure(error)

    def close(self) -> None:
        """Wait on all ranks until rank 0 has completed the last checkpoint."""
        self.wait()
        dist.barrier()
        self._thread.shutdown()

    def _folder(self) -> Path:
        assert self._manifest is not None
        return partial_folder(step_folder(self._checkpoints, self._manifest.step))

    def _write_rank_file(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / rank_file_name(self._rank)
        try:
            writer = SafetensorsWriter(path, [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.close()
            write_and_fsync(_rank_note_path(path), json.dumps([path.stat().st_size, file_sha256(path)]).encode())
        except OSError:
            for partial in folder.glob(f"{path.stem}.*"):  # at once, because the run's other files need the space
                partial.unlink(missing_ok=True)
            raise

    def _commit_checkpoint(self, manifest: Manifest, folder: Path) -> None:
        """Write the manifest and rename the folder, on rank 0 when all files are written."""
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
            abandon_checkpoint(final)  # a damaged checkpoint, or another program's folder
        folder.rename(final)
        fsync_folder(self._checkpoints)
        self.seconds = time.perf_counter() - self._started
        nbytes = sum(size for size, _ in files.values())
        self._log(f"checkpoint after {manifest.step} steps: {nbytes / 2**20:.1f} MiB in {self.seconds:.1f} s")
        for old in self._checkpoints_of_run(manifest)[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _checkpoints_of_run(self, newest: Manifest) -> list[Path]:
        """Return this run's checkpoints up to `newest`, newest first. Other folders are ignored."""
        return [
            folder
            for folder in find_written_checkpoints(self._checkpoints)
            if (manifest := read_manifest_if_complete(folder)) is not None
            and manifest.step <= newest.step
            and is_same_run(manifest.identity, newest.identity, folder)
        ]

    def _report_failure(self, error: BaseException) -> None:
        assert self._manifest is not None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        print(  # not through `log`, which prints on rank 0 only
            f"qlora-dist: [rank {self._rank}] the checkpoint after {self._manifest.step} steps could not be written to "
            f"{self._checkpoints} ({reason}); training continues, and the previous checkpoint stays",
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
