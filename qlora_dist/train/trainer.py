"""The training loop."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from torch.profiler import record_function

from qlora_dist.adapters.attach import named_trainable_parameters
from qlora_dist.checkpoint.snapshot import trainable_state
from qlora_dist.data.collate import Batch
from qlora_dist.errors import UserError
from qlora_dist.optim.adapter_shards import AdapterShards
from qlora_dist.optim.optimizer_state import PagedOptimizerState
from qlora_dist.optim.schedule import learning_rate
from qlora_dist.paging.pager import PagingStats
from qlora_dist.parallel.loaded_model import TrainableModel
from qlora_dist.runs.run_dir import RunDir, run_path
from qlora_dist.runtime.device_memory import peak_memory_bytes
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.train.console import RunConsole
from qlora_dist.train.control_flags import ControlFlags
from qlora_dist.train.evaluator import EVAL_SUMS_FILE, EvalSumsFile, Evaluator
from qlora_dist.train.run_checkpointer import ResumePoint, RunCheckpointer
from qlora_dist.train.run_control import RunControl
from qlora_dist.train.run_progress import RunProgress
from qlora_dist.train.run_setup import RunSetup
from qlora_dist.train.step_metrics import StepMetrics
from qlora_dist.train.step_profiler import DATA_LABEL, StepProfiler
from qlora_dist.train.stop_requests import StopRequests
from qlora_dist.train.train_step import StepResult, make_step_context, move_batch, train_step

_ASSUMED_WRITE_BYTES_PER_S = 100e6
"""Bytes per second at which a checkpoint is assumed to be written, until the run has written one."""
_CHECKPOINT_BYTES_PER_ELEMENT = 12
"""Bytes of a trained element and its two moments in fp32."""
_MAX_NAMES = 8
"""Number of layers without influence on the loss that are named."""


@dataclass(kw_only=True)
class TrainResult:
    """Outcome of the training loop, equal on all ranks unless a field says otherwise."""

    progress: RunProgress
    stop_reason: str | None = None
    """Name of the request that stopped the run before its last step; None after the last step."""
    tokens_per_s: list[float] = field(default_factory=list)
    """Tokens per second of each step that this process has done."""
    comm_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes that this rank received in the last step, by mesh dimension."""
    fetched_bytes: int = 0
    """Bytes of the base's layers that this rank fetched in the last step."""
    stall_shares: list[float] = field(default_factory=list)
    """Share of each step's time in which this rank waited for a layer of the base."""
    peak_bytes: int | None = None
    """Peak bytes of this rank before the profiled step; None if no step was profiled."""
    step_shares: dict[str, float] = field(default_factory=dict)
    """Shares of the profiled step's time on this rank, by kind; empty if no step was profiled."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """This rank's part of a step's global batch, with counts over all ranks."""

    started: float
    """`time.perf_counter()` at the beginning of the step."""
    index: int
    """Place of the global batch in the data's order."""
    micro_batches: list[Batch]
    """Micro-batches on this rank's device."""
    tokens: int
    """Tokens of all ranks, without padding."""
    trained_tokens: int
    """Tokens of all ranks that the loss is computed on."""
    data_s: float
    """Seconds spent making the batch."""


class Trainer:
    """Trains the adapters of a loaded model from a resume point to the last step, or until a request to stop.

    Every method is called on all ranks, in the same order. Only rank 0 has the run's folder.
    """

    def __init__(
        self,
        setup: RunSetup,
        resume_point: ResumePoint,
        loaded: TrainableModel,
        console: RunConsole,
        run_dir: RunDir | None = None,
    ) -> None:
        self._setup, self._config, self._console, self._run_dir = setup, setup.config.train, console, run_dir
        self._optimizer_state, self._paged_layers = loaded.optimizer_state, loaded.paged_layers
        self._traffic, shards = loaded.traffic, loaded.adapter_shards
        self._step_context = make_step_context(setup, loaded)
        state = trainable_state(setup.model, shards.local, self._step_context.optimizer, setup.device)
        self._checkpoints = RunCheckpointer(setup, resume_point, state, self._step_context.loss_scale, console)
        self.progress = self._checkpoints.resume(run_dir)
        self._result = TrainResult(progress=self.progress)
        self._earlier_wall_s, self._run_started = self.progress.wall_s, time.perf_counter()

        path = run_path(setup.config.run)
        elements = sum(p.numel() for _, p in named_trainable_parameters(setup.model))
        assumed_s = _CHECKPOINT_BYTES_PER_ELEMENT * elements / _ASSUMED_WRITE_BYTES_PER_S
        requests = StopRequests(
            path,
            is_rank_0=run_dir is not None,
            max_time=self._config.max_time,
            checkpoint_s=lambda: self._checkpoints.seconds or assumed_s,
        )
        self._control = RunControl(requests, self._checkpoints, loaded.traffic)
        sums_file = EvalSumsFile(path / EVAL_SUMS_FILE, setup, resume_point.fingerprint, shards.local)
        self._evaluator = Evaluator(setup, sums_file, self._control, self._save_checkpoint, console, run_dir)
        self._continues_run = (
            resume_point.folder is not None and resume_point.folder.parent.resolve() == (path / "checkpoints").resolve()
        )
        self._longest_step_s = 0.0
        self._profiler = StepProfiler(setup.device) if setup.config.run.profile else None

    def train(self, run_started: float | None = None) -> TrainResult:
        """Train, evaluate and save until the last step or a request to stop.

        This start of the run began at `run_started` by `time.perf_counter()`; None: when the trainer was made.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        stop_reason = self._start(run_started)
        while stop_reason is None:
            stop_reason = self._evaluator.evaluate_if_due(self.progress, self.last_step)
            if stop_reason is not None or self.progress.step >= self.last_step:
                break
            self._begin_step()
            batch = self._load_batch()
            result = self._run_step(batch)
            is_spike = self.progress.is_spike(result.loss, self._config.spike_factor)
            if (is_spike or not result.finite) and self._roll_back(batch, result, is_spike=is_spike):
                continue
            self.progress.record_step(result.loss, batch.tokens, finite=result.finite, spike=is_spike)
            self._log_step(batch, result)
            self._raise_if_diverged()
            stop_reason = self._stop_reason(result.flags)
            if self._is_save_due() or stop_reason is not None or result.flags.save_file:
                self._save_checkpoint()
            self._control.acknowledge(result.flags)
        return self._finish(stop_reason)

    @property
    def last_step(self) -> int:
        """Number of the last step. With `train.epochs`, batches that a rollback left out shorten the run."""
        steps = self._setup.steps
        return steps if self._setup.loader.steps is None else steps - len(self.progress.left_out)

    def _start(self, run_started: float | None) -> str | None:
        """Return the reason if the run is to stop before its first step."""
        self._run_started = self._run_started if run_started is None else run_started
        flags = self._control.sum_flags(0.0)
        self._control.acknowledge(flags, saved=False)
        self._evaluator.load_completed(self.progress.step, same_run=self._continues_run)
        self._setup.model.train()
        return flags.stop_reason

    def _begin_step(self) -> None:
        if self._is_first_step():
            self._console.start_steps(self._setup.steps, self.progress.step)
        # the bytes of an evaluation or a checkpoint belong to no step
        self._traffic.take()
        if self._paged_layers is not None:
            self._paged_layers.pager.take_counts()
        if self._profiler is not None and self.progress.step == self.last_step - 1:
            self._profiler.begin()

    def _load_batch(self) -> StepBatch:
        started = time.perf_counter()
        record_heartbeat(self.progress.step, "reading data")
        index, loader = self.progress.batch_index(), self._setup.loader
        with record_function(DATA_LABEL):
            micro_batches = [move_batch(micro, self._setup.device) for micro in loader.micro_batches(index)]
        tokens, trained_tokens = loader.tokens(index), loader.loss_tokens(index)
        return StepBatch(
            started=started,
            index=index,
            micro_batches=micro_batches,
            tokens=tokens,
            trained_tokens=trained_tokens,
            data_s=time.perf_counter() - started,
        )

    def _run_step(self, batch: StepBatch) -> StepResult:
        self._step_context.optimizer.lr = learning_rate(self.progress.step, self._setup.steps, self._setup.config.optim)
        timeout_factor = self._setup.compile_timeout_factor if self._is_first_step() else None
        record_heartbeat(self.progress.step, "training", timeout_factor)
        result = train_step(self._step_context, batch.micro_batches, batch.trained_tokens, self._own_flags)
        if self._is_first_step():
            _log_unused_adapters(self._step_context.shards, self._console)
        self._control.update_checkpoints(result.flags)
        return result

    def _own_flags(self) -> ControlFlags:
        """Return this rank's flags. The next step is assumed to take up to twice as long as any so far."""
        return self._control.own_flags(2 * self._longest_step_s + self._evaluator.longest_batch_s)

    def _is_first_step(self) -> bool:
        """Return whether this process has not completed a step yet."""
        return not self._result.tokens_per_s

    def _roll_back(self, batch: StepBatch, result: StepResult, *, is_spike: bool) -> bool:
        """Report a bad step. Return whether the newest checkpoint was restored, which `train.on_spike` asks for."""
        details = f"loss {result.loss:.4f}, gradient norm {result.grad_norm:.3g}, global batch {batch.index}"
        self._console.say(f"step {self.progress.step + 1}: {'a spike' if is_spike else 'not finite'} ({details})")
        # fp16 overflows now and then until its loss scale is found
        is_overflow = not is_spike and self._setup.config.model.compute_dtype == "fp16"
        if self._config.on_spike != "rollback" or is_overflow:
            return False
        record_heartbeat(self.progress.step, "saving a checkpoint")
        restored = self._checkpoints.roll_back(self.progress, batch.index)
        if restored is None:
            return False
        self.progress = restored
        if self._run_dir is not None:
            self._run_dir.roll_back(restored.step)
        return True

    def _log_step(self, batch: StepBatch, result: StepResult) -> None:
        step_s = time.perf_counter() - batch.started
        self._longest_step_s = max(self._longest_step_s, step_s)
        state, layers, lr = self._optimizer_state, self._paged_layers, self._step_context.optimizer.lr
        paging = state.pager.take_counts() if isinstance(state, PagedOptimizerState) else PagingStats()
        base_paging = layers.pager.take_counts() if layers is not None else PagingStats()
        tokens_per_s, peak_bytes = batch.tokens / step_s, peak_memory_bytes(self._setup.device)
        self._result.tokens_per_s.append(tokens_per_s)
        self._result.comm_bytes = self._traffic.take()
        self._result.fetched_bytes = base_paging.bytes_in
        self._result.stall_shares.append(base_paging.stall_s / step_s)
        self._console.log_step(self.progress.step, result.loss, lr, tokens_per_s, peak_bytes)
        if self._run_dir is None:
            return
        metrics = StepMetrics(
            step=self.progress.step,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            skipped=not result.finite,
            tokens=batch.tokens,
            trained_tokens=batch.trained_tokens,
            positions=self._setup.loader.padded_tokens(batch.index),
            tokens_per_s=tokens_per_s,
            step_s=step_s,
            data_s=batch.data_s,
            comm_bytes=self._result.comm_bytes,
            peak_bytes=peak_bytes,
            resident_bytes=state.resident_bytes,
            paged_bytes=state.paged_bytes,
            paging=paging,
            base_paging=base_paging if layers is not None else None,
            base_resident_bytes=layers.held_bytes if layers is not None else None,
        )
        self._run_dir.log(metrics.to_row())

    def _raise_if_diverged(self) -> None:
        """Raise UserError after `train.max_skipped_steps` steps in a row that were not finite."""
        limit = self._config.max_skipped_steps
        if self.progress.skipped_in_a_row == limit:
            raise UserError(
                f"step {self.progress.step}: the loss or gradient was not finite {limit} times in a row; "
                "lower optim.lr, or use model.compute_dtype=bf16"
            )

    def _stop_reason(self, flags: ControlFlags) -> str | None:
        """Return the reason to stop after this step. After the last step only an evaluation is left to be interrupted.

        That evaluation checks `train.max_time` itself.
        """
        step, reason = self.progress.step, flags.stop_reason
        if step == self.last_step and (reason == "max_time" or not self._evaluator.is_due(step, step)):
            return None
        return reason

    def _is_save_due(self) -> bool:
        step, every = self.progress.step, self._config.save_every
        return step == self.last_step or (every > 0 and step % every == 0)

    def _save_checkpoint(self) -> None:
        record_heartbeat(self.progress.step, "saving a checkpoint")
        self._update_wall_time()
        self._checkpoints.save(self.progress)

    def _update_wall_time(self) -> None:
        self.progress.wall_s = self._earlier_wall_s + time.perf_counter() - self._run_started

    def _finish(self, stop_reason: str | None) -> TrainResult:
        """Complete the last checkpoint, and return the result."""
        self._update_wall_time()
        self._console.close_progress()
        self._result.progress, self._result.stop_reason = self.progress, stop_reason
        if self._profiler is not None and (shares := self._profiler.end()):
            self._result.step_shares, self._result.peak_bytes = shares, self._profiler.peak_bytes
        record_heartbeat(self.progress.step, "completing the last checkpoint")
        self._checkpoints.close()
        return self._result


def _log_unused_adapters(shards: AdapterShards, console: RunConsole) -> None:
    """Print one line that names the layers whose adapters have no gradient. Called on all ranks after the first step.

    Some layers take no part in the loss, such as an indexer that only chooses what attention sees. As in PEFT, their
    adapters stay unchanged and are exported with B = 0.
    """
    names = shards.find_unused_parameters()
    if not names:
        return
    layers = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", re.split(r"\.lora_|\.weight$", name)[0]) for name in names})
    listed = ", ".join(layers[:_MAX_NAMES]) + (" and others" if len(layers) > _MAX_NAMES else "")
    console.say(f"adapters without influence on the loss, which are exported unchanged: {listed}")
