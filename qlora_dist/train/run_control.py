"""The exchange of control flags between the ranks, after each step and before each batch of an evaluation."""

from __future__ import annotations

from dataclasses import replace

import torch

from qlora_dist.parallel.mesh import CommCounter
from qlora_dist.train.control_flags import ControlFlags
from qlora_dist.train.run_checkpointer import RunCheckpointer
from qlora_dist.train.stop_requests import StopRequests


class RunControl:
    """Requests to stop or save, and the status of checkpoints, on which all ranks agree."""

    def __init__(self, requests: StopRequests, checkpoints: RunCheckpointer, traffic: CommCounter) -> None:
        self._requests, self._checkpoints, self.traffic = requests, checkpoints, traffic

    def own_flags(self, ahead_s: float) -> ControlFlags:
        """Return this rank's flags, with `ahead_s` as in `StopRequests.flags`."""
        written, failed = self._checkpoints.progress
        return replace(self._requests.flags(ahead_s), checkpoints_written=written, checkpoints_failed=failed)

    def sum_flags(self, ahead_s: float) -> ControlFlags:
        """Sum the flags of all ranks in a collective of their own, and complete a checkpoint that all have written."""
        own = torch.tensor(self.own_flags(ahead_s).to_list(), dtype=torch.float64)
        flags = ControlFlags.from_sums(self.traffic.all_reduce(own).tolist())
        self.update_checkpoints(flags)
        return flags

    def update_checkpoints(self, flags: ControlFlags) -> None:
        """Complete or give up the current checkpoint, once every rank has written its file or failed to."""
        self._checkpoints.update_status(flags.checkpoints_written, flags.checkpoints_failed)

    def acknowledge(self, flags: ControlFlags, *, saved: bool = True) -> None:
        self._requests.acknowledge(flags, saved=saved)
