"""The evaluations of a run: when they are due, what interrupts them, and how a restarted run continues them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qlora_dist.runs.json_object import read_json_object
from qlora_dist.runs.run_dir import RunDir
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.runtime.object_collectives import all_gather_json, broadcast_json
from qlora_dist.train.console import RunConsole
from qlora_dist.train.control_flags import ControlFlags
from qlora_dist.train.evaluation_loop import EvalSums, evaluation_loop
from qlora_dist.train.run_control import RunControl
from qlora_dist.train.run_progress import RunProgress
from qlora_dist.train.run_setup import RunSetup
from qlora_dist.train.train_step import move_batch

EVAL_SUMS_FILE = "evaluation.json"


class EvalSumsFile:
    """File with the sums of all ranks in an interrupted evaluation, which the next start continues.

    Without it, an evaluation that takes longer than a job's time limit would never end. The sums are used only if the
    number of ranks, the data, the settings and the weights are unchanged. Methods are called on all ranks, and rank 0
    reads and writes the file.
    """

    def __init__(
        self, path: Path, setup: RunSetup, fingerprint: dict[str, Any], weights: Sequence[torch.Tensor]
    ) -> None:
        self._path, self._is_rank_0, self._weights = path, setup.ranks.rank == 0, weights
        same = [fingerprint, setup.data_sha256.get("eval"), setup.config.train.micro_batch, setup.ranks.world_size]
        self._fingerprint = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()

    def pop(self, step: int) -> EvalSums:
        """Return this rank's sums of the evaluation after `step`, or empty ones, and remove the file."""
        kept = broadcast_json(read_json_object(self._path) if self._is_rank_0 else None)
        sums, weights = EvalSums(), None
        with suppress(ValueError, KeyError, TypeError, IndexError, AttributeError):
            if (kept["step"], kept["identity"]) == (step, self._fingerprint):
                batches, loss, tokens, weights = kept["ranks"][torch.distributed.get_rank()]
                sums = EvalSums(int(batches), float(loss), float(tokens))
        fits = all_gather_json([weights == self._weights_sum(), sums.batches])
        self.remove()
        return sums if all(fit == [True, sums.batches] for fit in fits) else EvalSums()

    def save(self, step: int, sums: EvalSums) -> None:
        ranks = all_gather_json([sums.batches, sums.loss, sums.tokens, self._weights_sum()])
        if self._is_rank_0 and sums.batches:
            with suppress(OSError):  # on a full disk the evaluation starts again from its beginning
                text = json.dumps({"step": step, "identity": self._fingerprint, "ranks": ranks})
                self._path.write_text(text + "\n", encoding="utf-8")

    def remove(self) -> None:
        if self._is_rank_0:
            with suppress(OSError):
                self._path.unlink()

    def _weights_sum(self) -> float:
        return sum(float(weight.detach().double().sum()) for weight in self._weights)


class Evaluator:
    """Evaluations that a request to stop interrupts between any two batches, on all ranks together.

    The metrics of the step are written before its evaluation, and so is its checkpoint if one is due. An interrupted
    evaluation continues when the run is started again. Methods are called on all ranks.
    """

    def __init__(
        self,
        setup: RunSetup,
        sums_file: EvalSumsFile,
        control: RunControl,
        save: Callable[[], None],
        console: RunConsole,
        run_dir: RunDir | None,
    ) -> None:
        self._model, self._every = setup.model, setup.config.train.eval_every
        self._batches = [move_batch(batch, setup.device) for batch in setup.eval_batches]
        self._timeout_factor = setup.compile_timeout_factor
        self._sums_file, self._control, self._save = sums_file, control, save
        self._console, self._run_dir = console, run_dir
        self._loss_by_step: dict[int, float] = {}
        self._may_resume = True
        self._flags = ControlFlags()
        """Sums of the control flags before the last batch."""
        self._batch_started = 0.0
        self.longest_batch_s = 0.0
        """Seconds of the slowest batch so far."""

    def load_completed(self, step: int, *, same_run: bool) -> None:
        """Look up in the metrics whether the evaluation after `step`, where the run starts, was completed.

        The checkpoint has no record of it, because it is begun before the evaluation. The metrics count only if they
        belong to the same run as the checkpoint.
        """
        logged_loss = self._run_dir.eval_loss(step) if self._run_dir is not None and same_run else None
        loss = broadcast_json(logged_loss)
        if loss is not None:
            self._loss_by_step[step] = loss

    def is_due(self, step: int, last_step: int) -> bool:
        """Return whether there is an evaluation after this step."""
        due = step in (0, last_step) or (self._every > 0 and step % self._every == 0)
        return bool(self._batches) and due

    def evaluate_if_due(self, progress: RunProgress, last_step: int) -> str | None:
        """Evaluate if that is due after this step and not yet done. Return the reason to stop if it is interrupted."""
        step = progress.step
        if progress.evaluated == step:
            return None
        if step in self._loss_by_step:
            self._record_known_loss(progress)
            return None
        if not self.is_due(step, last_step):
            return None
        record_heartbeat(step, "evaluating", self._timeout_factor)
        self._batch_started = time.perf_counter()
        sums = self._load_sums(step)
        loss = evaluation_loop(self._model, self._batches, self._control.traffic, sums, lambda: self._should_stop(step))
        if loss is None:
            self._sums_file.save(step, sums)
            reason = self._flags.stop_reason
            self._console.say(
                f"{reason} interrupts the evaluation after {step} steps, at {sums.batches} of {len(self._batches)} "
                "batches; the next start continues it"
            )
            return reason
        self._loss_by_step[step] = loss
        progress.record_eval(loss)
        self._console.say(f"held-out loss after {step} steps: {loss:.4f}")
        if self._run_dir is not None:
            self._run_dir.log_eval_loss(step, loss)
        return None

    def _record_known_loss(self, progress: RunProgress) -> None:
        step, loss = progress.step, self._loss_by_step[progress.step]
        progress.record_eval(loss)
        # a step that is repeated after a rollback has a new line
        if self._run_dir is not None and self._run_dir.eval_loss(step) is None:
            self._run_dir.log_eval_loss(step, loss)

    def _load_sums(self, step: int) -> EvalSums:
        """Return the sums of the evaluation after `step` that an earlier start left, or empty ones."""
        # such sums are either of the step that this start begins with, or of no use
        sums = self._sums_file.pop(step) if self._may_resume else EvalSums()
        self._may_resume = False
        if sums.batches:
            self._console.say(
                f"the evaluation after {step} steps continues after {sums.batches} of {len(self._batches)} batches"
            )
        return sums

    def _should_stop(self, step: int) -> bool:
        """Answer requests before a batch, and return whether one of them is to stop."""
        now = time.perf_counter()
        self.longest_batch_s, self._batch_started = max(self.longest_batch_s, now - self._batch_started), now
        self._flags = self._control.sum_flags(2 * self.longest_batch_s)
        should_stop = self._flags.stop_reason is not None
        if step > 0 and (should_stop or self._flags.save_file):
            self._save()
            record_heartbeat(step, "evaluating", self._timeout_factor)
        self._control.acknowledge(self._flags, saved=step > 0)
        return should_stop
