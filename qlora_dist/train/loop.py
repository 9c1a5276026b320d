"""The training loop."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_dist.data.rows import Batch
from qlora_dist.errors import UserError
from qlora_dist.optim.adamw import build_optimizer, state_bytes
from qlora_dist.optim.loss_scale import LossScale
from qlora_dist.optim.schedule import learning_rate
from qlora_dist.parallel.traffic import Traffic
from qlora_dist.train.beat import beat
from qlora_dist.train.console import RunConsole
from qlora_dist.train.evaluate import evaluate
from qlora_dist.train.memory import peak_bytes
from qlora_dist.train.run_dir import RunDir
from qlora_dist.train.setup import Setup
from qlora_dist.train.step import AdapterShards, train_step

_COMPILING = 6.0
"""Times the usual timeout, for steps and evaluations that may compile first."""


@dataclass
class History:
    """What the loop leaves behind; equal on all ranks."""

    losses: list[float] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    """The first is that of the base model alone."""
    tokens_per_s: list[float] = field(default_factory=list)
    comm_bytes: dict[str, int] = field(default_factory=dict)
    """This rank's, received in the last step, by mesh dimension."""
    skipped_steps: int = 0


def train_loop(
    model: PreTrainedModel, setup: Setup, traffic: Traffic, console: RunConsole, run_dir: RunDir | None
) -> History:
    """Train the adapters.

    Args:
        model: sharded and filled.
        setup: the run.
        traffic: what the model's collectives are counted in.
        console: for progress.
        run_dir: where metrics go; None on ranks other than 0.

    Raises:
        UserError: too many steps in a row were not finite.
    """
    cfg, history = setup.config.train, History()
    patience = _COMPILING if cfg.compile else None
    shards = AdapterShards(model)
    optimizer = build_optimizer(shards.local, setup.config.optim)
    loss_scale = LossScale(setup.config.model.compute_dtype)
    eval_batches = [_to(batch, setup.device) for batch in setup.eval_batches]

    def held_out(step: int) -> dict[str, float]:
        due = step in (0, cfg.steps) or (cfg.eval_every and step % cfg.eval_every == 0)
        if not eval_batches or not due:
            return {}
        beat(step, "evaluating", patience)
        history.eval_losses.append(evaluate(model, eval_batches, traffic))
        console.say(f"held-out loss after {step} steps: {history.eval_losses[-1]:.4f}")
        return {"eval_loss": history.eval_losses[-1]}

    def log(metrics: dict[str, Any]) -> None:
        if run_dir is not None:
            run_dir.log(metrics)

    if first := held_out(0):
        log({"step": 0, **first})
    traffic.take()
    skipped_in_a_row = 0
    console.start_steps(cfg.steps)
    model.train()
    for step in range(cfg.steps):
        started = time.perf_counter()
        beat(step, "reading data")
        window = [_to(batch, setup.device) for batch in setup.loader.window(step)]
        tokens, trained_tokens = setup.loader.tokens(step), setup.loader.trained_tokens(step)
        data_s = time.perf_counter() - started

        lr = learning_rate(step, cfg.steps, setup.config.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        beat(step, "training", None if history.tokens_per_s else patience)
        result = train_step(
            model,
            window,
            trained_tokens,
            shards,
            setup.sizes.adapter_replicas,
            optimizer,
            loss_scale,
            setup.config.optim.max_grad_norm,
            traffic,
        )
        step_s = time.perf_counter() - started

        history.losses.append(result.loss)
        history.tokens_per_s.append(tokens / step_s)
        history.comm_bytes = traffic.take()
        skipped_in_a_row = 0 if result.finite else skipped_in_a_row + 1
        history.skipped_steps += not result.finite
        peak = peak_bytes(setup.device)
        console.step(step + 1, result.loss, lr, tokens / step_s, peak)
        log(
            {
                "step": step + 1,
                "loss": result.loss,
                "lr": lr,
                "grad_norm": result.grad_norm,
                "skipped": not result.finite,
                "tokens": tokens,
                "trained_tokens": trained_tokens,
                "tokens_per_s": tokens / step_s,
                "step_s": step_s,
                "data_s": data_s,
                "comm_bytes": history.comm_bytes,
                "peak_bytes": peak,
                "resident_bytes": state_bytes(optimizer),
                "paged_bytes": 0,
                **held_out(step + 1),
            }
        )
        traffic.take()  # an evaluation's bytes are no step's
        if skipped_in_a_row == cfg.max_skipped_steps:
            raise UserError(
                f"step {step + 1}: the loss or gradient was not finite {skipped_in_a_row} times in a row; lower "
                "optim.lr, or use model.compute_dtype=bf16"
            )
    console.stop()
    return history


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(tensor.to(device) for tensor in batch))
