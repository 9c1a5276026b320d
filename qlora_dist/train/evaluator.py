"""The evaluations of a run: when they are due, what interrupts them, and how they are made up for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from qlora_dist.data.collate import Batch
from qlora_dist.parallel.comm_counter import CommCounter
from qlora_dist.runs.run_dir import RunDir
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.runtime.object_collectives import broadcast_json
from qlora_dist.train.console import RunConsole
from qlora_dist.train.eval_sums_file import EvalSumsFile
from qlora_dist.train.evaluation_loop import EvalSums, evaluation_loop
from qlora_dist.train.run_checkpointer import RunCheckpointer
from qlora_dist.train.run_progress import RunProgress
from qlora_dist.train.stop_requests import StopRequests, is_save_requested, stop_reason


class Evaluator:
    """Evaluations that are interrupted by requests to stop, between any two batches, on all ranks together.

    The metrics of the step are written before its evaluation, and so is its checkpoint where one is due. An evaluation
    that was interrupted goes on when the run is started again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        every: int,
        sums_file: EvalSumsFile,
        traffic: CommCounter,
        checkpoints: RunCheckpointer,
        save: Callable[[], None],
        requests: StopRequests,
        console: RunConsole,
        run_dir: RunDir | None,
        timeout_factor: float | None,
    ) -> None:
        """Begin with none.

        Args:
            model: sharded and filled.
            batches: this rank's, on its device; empty: there is nothing to evaluate on.
            every: steps between two evaluations; 0: only before the first step and after the last.
            sums_file: the sums of an evaluation that an earlier start has left.
            traffic: counts the collectives.
            checkpoints: of the run.
            save: begins a checkpoint of this moment.
            requests: to stop or to save.
            console: for the losses.
            run_dir: where they are written; None on ranks other than 0.
            timeout_factor: times the usual timeout that a batch may take.
        """
        self._model, self._batches, self._every, self._kept = model, batches, every, sums_file
        self._traffic, self._checkpoints, self._save, self._requests = traffic, checkpoints, save, requests
        self._console, self._run_dir, self._timeout_factor = console, run_dir, timeout_factor
        self._loss_by_step: dict[int, float] = {}
        self._longest_batch_s, self._may_resume = 0.0, True

    @property
    def longest_batch_s(self) -> float:
        """Time of the slowest batch until now."""
        return self._longest_batch_s

    def load_completed(self, step: int, same_run: bool) -> None:
        """Look up in the metrics whether the evaluation after `step`, where the run starts, was completed.

        The checkpoint does not know: it was begun before the evaluation.

        Args:
            step: that is done.
            same_run: whether the metrics until there are those of the checkpoint.
        """
        logged_loss = self._run_dir.eval_loss(step) if self._run_dir is not None and same_run else None
        loss = broadcast_json(logged_loss)
        if loss is not None:
            self._loss_by_step[step] = loss

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether there is an evaluation after this step."""
        due = step in (0, last_step) or (self._every > 0 and step % self._every == 0)
        return bool(self._batches) and due

    def evaluate(self, progress: RunProgress, last_step: int) -> str | None:
        """Evaluate if that is due after this step and has not been done.

        Returns:
            Why to stop, if the evaluation was interrupted.
        """
        step = progress.step
        if progress.evaluated == step:
            return None
        if step in self._loss_by_step:
            progress.evaluate(self._loss_by_step[step])
            # a step that is done again after a rollback has a new line
            if self._run_dir is not None and self._run_dir.eval_loss(step) is None:
                self._run_dir.log_eval_loss(step, self._loss_by_step[step])
            return None
        if not self.is_due(step, last_step):
            return None
        record_heartbeat(step, "evaluating", self._timeout_factor)
        asked: list[float] = []
        since = time.perf_counter()
        # what an earlier start has left is of the step that this one starts from, or of no use
        sums = self._kept.take(step) if self._may_resume else EvalSums()
        self._may_resume = False
        if sums.batches:
            self._console.say(
                f"the evaluation after {step} steps goes on after {sums.batches} of {self._count} batches"
            )

        def interrupted() -> bool:
            nonlocal asked, since
            now = time.perf_counter()
            self._longest_batch_s, since = max(self._longest_batch_s, now - since), now
            flags = self._requests.flags(2 * self._longest_batch_s)
            control_flags = torch.tensor([*self._checkpoints.progress, *flags], dtype=torch.float64)
            written, failed, *asked = self._traffic.all_reduce(control_flags).tolist()
            self._checkpoints.update_status(int(written), int(failed))
            stops = stop_reason(asked) is not None
            if step > 0 and (stops or is_save_requested(asked)):
                self._save()
                record_heartbeat(step, "evaluating", self._timeout_factor)
            self._requests.acknowledge(asked, saved=step > 0)
            return stops

        loss = evaluation_loop(self._model, self._batches, self._traffic, sums, interrupted)
        if loss is None:
            self._kept.save(step, sums)
            interrupt_reason = stop_reason(asked)
            self._console.say(
                f"{interrupt_reason} interrupts the evaluation after {step} steps, at {sums.batches} of {self._count} batches; "
                "the next start goes on with it"
            )
            return interrupt_reason
        self._loss_by_step[step] = loss
        progress.evaluate(loss)
        self._console.say(f"held-out loss after {step} steps: {loss:.4f}")
        if self._run_dir is not None:
            self._run_dir.log_eval_loss(step, loss)
        return None

    @property
    def _count(self) -> int:
        return len(self._batches)
