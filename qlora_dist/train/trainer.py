"""The training loop."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.profiler import record_function
from transformers import PreTrainedModel

from qlora_dist.adapters.attach import named_trainable_parameters
from qlora_dist.checkpoint.snapshot import trainable_state
from qlora_dist.data.collate import Batch
from qlora_dist.errors import UserError
from qlora_dist.optim.loss_scale import LossScale
from qlora_dist.optim.optimizer_state import PagedOptimizerState
from qlora_dist.optim.schedule import learning_rate
from qlora_dist.paging.pager import PagingStats
from qlora_dist.parallel.comm_counter import CommCounter
from qlora_dist.parallel.deepspeed_optimizer import ZeroOptimizerState
from qlora_dist.parallel.paged_layers import PagedLayers
from qlora_dist.runs.run_dir import RunDir, run_path
from qlora_dist.runtime.device_memory import peak_memory_bytes
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.train.console import RunConsole
from qlora_dist.train.eval_sums_file import EVAL_SUMS_FILE, EvalSumsFile
from qlora_dist.train.evaluator import Evaluator
from qlora_dist.train.optimizer import make_optimizer
from qlora_dist.train.run_checkpointer import ResumePoint, RunCheckpointer
from qlora_dist.train.run_progress import RunProgress
from qlora_dist.train.run_setup import RunSetup
from qlora_dist.train.step_profiler import DATA_LABEL, StepProfiler
from qlora_dist.train.stop_requests import StopRequests, is_save_requested, stop_reason
from qlora_dist.train.train_step import AdapterShards, train_step
from qlora_dist.train.unused_adapters import log_unused_adapters

_COMPILE_TIMEOUT_FACTOR = 6.0
"""Times the usual timeout, for steps and evaluations that may compile first."""


_ASSUMED_WRITE_BYTES_PER_S = 100e6
"""Bytes per second at which a checkpoint is supposed to be written until one has been."""


@dataclass
class TrainResult:
    """What the loop leaves behind; equal on all ranks."""

    progress: RunProgress
    stop: str | None = None
    """Why it ended before its last step (one of `stop.REASONS`); None: it did not."""
    tokens_per_s: list[float] = field(default_factory=list)
    """Of the steps that this process has done."""
    comm_bytes: dict[str, int] = field(default_factory=dict)
    """This rank's, received in the last step, by mesh dimension."""
    fetched_bytes: int = 0
    """Of the base's layers, by this rank in the last step."""
    stalls: list[float] = field(default_factory=list)
    """Of each step the share of its time in which this rank waited for a layer of the base."""
    peak_bytes: int | None = None
    """This rank's, before the step that was profiled; None: none was."""
    step_shares: dict[str, float] = field(default_factory=dict)
    """This rank's, of that step, by kind; empty: none was profiled."""


def train_loop(
    model: PreTrainedModel,
    optimizer_state: PagedOptimizerState | ZeroOptimizerState,
    setup: RunSetup,
    resume_point: ResumePoint,
    traffic: CommCounter,
    console: RunConsole,
    run_dir: RunDir | None,
    paged_layers: PagedLayers | None = None,
    run_started: float | None = None,
) -> TrainResult:
    """Train the adapters, from `resume_point` to the last step or until somebody asks to stop.

    Args:
        model: sharded and filled.
        optimizer_state: of the optimizer, for this rank's shards.
        setup: the run.
        resume_point: the beginning, or a checkpoint.
        traffic: what the model's collectives are counted in.
        console: for progress.
        run_dir: where metrics go; None on ranks other than 0.
        paged_layers: of the base; None: it is not paged.
        run_started: `time.perf_counter()` when this start began; None: now.

    Raises:
        UserError: too many steps in a row were not finite.
    """
    cfg = setup.config.train
    timeout_factor = _COMPILE_TIMEOUT_FACTOR if cfg.compile else None
    shards = AdapterShards(model)
    optimizer = make_optimizer(shards, optimizer_state, setup)
    loss_scale = LossScale(setup.config.model.compute_dtype)
    state = trainable_state(model, shards.local, optimizer, setup.device)
    checkpoints = RunCheckpointer(setup, resume_point, state, loss_scale, console)
    progress = checkpoints.start(run_dir)
    history = TrainResult(progress)
    path = run_path(setup.config.run)
    unmeasured_s = 12 * sum(p.numel() for _, p in named_trainable_parameters(model)) / _ASSUMED_WRITE_BYTES_PER_S
    requests = StopRequests(path, run_dir is not None, cfg.max_time, lambda: checkpoints.seconds or unmeasured_s)
    run_started, before_s = time.perf_counter() if run_started is None else run_started, progress.wall_s

    def last_step() -> int:
        """Global batches that were left out are missing at the end of so many epochs."""
        return setup.steps if setup.loader.steps is None else setup.steps - len(progress.left_out)

    def save() -> None:
        record_heartbeat(progress.step, "saving a checkpoint")
        progress.wall_s = before_s + time.perf_counter() - run_started
        checkpoints.save(progress)

    evaluations = Evaluator(
        model,
        [_batch_to(batch, setup.device) for batch in setup.eval_batches],
        cfg.eval_every,
        EvalSumsFile(path / EVAL_SUMS_FILE, setup, resume_point.identity, shards.local),
        traffic,
        checkpoints,
        save,
        requests,
        console,
        run_dir,
        timeout_factor,
    )

    def control_flags() -> list[float]:
        """What the ranks tell each other at the end of a step; the next one may be twice as slow as any until now."""
        ahead_s = 2 * longest_step_s + evaluations.longest_batch_s
        return [*checkpoints.progress, *requests.flags(ahead_s)]

    def reset_step_counters() -> None:
        traffic.take()
        if paged_layers is not None:
            paged_layers.pager.take_counts()

    stop_requests = traffic.all_reduce(torch.tensor(requests.flags(0.0), dtype=torch.float64)).tolist()
    history.stop = stop_reason(stop_requests)
    requests.acknowledge(stop_requests, saved=False)
    evaluations.load_completed(
        progress.step,
        resume_point.folder is not None and resume_point.folder.parent.resolve() == (path / "checkpoints").resolve(),
    )
    longest_step_s = 0.0
    profiled = StepProfiler(setup.device) if setup.config.run.profile else None
    model.train()
    while history.stop is None:
        history.stop = evaluations.evaluate(progress, last_step())
        if history.stop is not None or progress.step >= last_step():
            break
        if longest_step_s == 0.0:
            console.start_steps(setup.steps, progress.step)
        reset_step_counters()  # the bytes of an evaluation or a checkpoint are no step's
        if profiled is not None and progress.step == last_step() - 1:
            profiled.begin()
        started = time.perf_counter()
        record_heartbeat(progress.step, "reading data")
        batch = progress.batch_index()
        with record_function(DATA_LABEL):
            micro_batches = [_batch_to(micro, setup.device) for micro in setup.loader.window(batch)]
        tokens, loss_tokens = setup.loader.tokens(batch), setup.loader.trained_tokens(batch)
        data_s = time.perf_counter() - started

        lr = learning_rate(progress.step, setup.steps, setup.config.optim)
        optimizer.lr = lr
        record_heartbeat(progress.step, "training", None if history.tokens_per_s else timeout_factor)
        result = train_step(
            model,
            micro_batches,
            loss_tokens,
            shards,
            setup.sizes.adapter_replicas,
            optimizer,
            loss_scale,
            setup.config.optim.max_grad_norm,
            traffic,
            control_flags=control_flags,
        )
        if not history.tokens_per_s:
            log_unused_adapters(shards, console)
        written, failed, *stop_requests = result.sums
        checkpoints.update_status(int(written), int(failed))

        spike = progress.is_spike(result.loss, cfg.spike_factor)
        if spike or not result.finite:
            details = f"loss {result.loss:.4f}, gradient norm {result.grad_norm:.3g}, global batch {batch}"
            console.say(f"step {progress.step + 1}: {'a spike' if spike else 'not finite'} ({details})")
            # fp16 overflows now and then while its loss scale is found
            if cfg.on_spike == "rollback" and (spike or setup.config.model.compute_dtype != "fp16"):
                record_heartbeat(progress.step, "saving a checkpoint")
                rolled_back = checkpoints.go_back(progress, batch)
                if rolled_back is not None:
                    progress = history.progress = rolled_back
                    if run_dir is not None:
                        run_dir.roll_back(progress.step)
                    continue
        progress.count(result.loss, tokens, result.finite, spike)
        step_s = time.perf_counter() - started
        longest_step_s = max(longest_step_s, step_s)

        history.tokens_per_s.append(tokens / step_s)
        history.comm_bytes = traffic.take()
        paging = (
            optimizer_state.pager.take_counts() if isinstance(optimizer_state, PagedOptimizerState) else PagingStats()
        )
        base_paging = paged_layers.pager.take_counts() if paged_layers is not None else PagingStats()
        history.fetched_bytes = base_paging.bytes_in
        history.stalls.append(base_paging.stall_s / step_s)
        peak = peak_memory_bytes(setup.device)
        console.step(progress.step, result.loss, lr, tokens / step_s, peak)
        metrics = {
            "step": progress.step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "skipped": not result.finite,
            "tokens": tokens,
            "trained_tokens": loss_tokens,
            "positions": setup.loader.positions(batch) if run_dir is not None else None,
            "tokens_per_s": tokens / step_s,
            "step_s": step_s,
            "data_s": data_s,
            "comm_bytes": history.comm_bytes,
            "peak_bytes": peak,
            "resident_bytes": optimizer_state.resident_bytes,
            "paged_bytes": optimizer_state.paged_bytes,
            "paging": asdict(paging),
            **_paging_metrics(paged_layers, base_paging),
        }
        if run_dir is not None:
            run_dir.log(metrics)
        if progress.skipped_in_a_row == cfg.max_skipped_steps:
            raise UserError(
                f"step {progress.step}: the loss or gradient was not finite {cfg.max_skipped_steps} times in a row; "
                "lower optim.lr, or use model.compute_dtype=bf16"
            )
        last = progress.step == last_step()
        history.stop = stop_reason(stop_requests)
        if last and (history.stop == "max_time" or not evaluations.is_due(progress.step, progress.step)):
            history.stop = None  # an evaluation sees by itself that time is up
        due = cfg.save_every and progress.step % cfg.save_every == 0
        if due or last or history.stop is not None or is_save_requested(stop_requests):
            save()
        requests.acknowledge(stop_requests)
    progress.wall_s = before_s + time.perf_counter() - run_started
    console.stop()
    if profiled is not None and (shares := profiled.end()):
        history.step_shares, history.peak_bytes = shares, profiled.peak_bytes
    record_heartbeat(progress.step, "completing the last checkpoint")
    checkpoints.close()
    return history


def _paging_metrics(pages: PagedLayers | None, counts: PagingStats) -> dict[str, Any]:
    """What metrics say of a base that is paged."""
    return {} if pages is None else {"base_paging": asdict(counts), "base_resident_bytes": pages.held_bytes}


def _batch_to(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(tensor.to(device) for tensor in batch))
