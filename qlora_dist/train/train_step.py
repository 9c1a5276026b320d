"""One optimizer step, and the optimizer that the configuration names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import record_function
from transformers import PreTrainedModel

from qlora_dist.compat.torch import foreach_mul_, foreach_norm
from qlora_dist.data.collate import Batch
from qlora_dist.errors import UserError
from qlora_dist.optim.adamw import PagedAdamW
from qlora_dist.optim.adapter_shards import AdapterShards
from qlora_dist.optim.loss_scale import LossScale
from qlora_dist.parallel.deepspeed_optimizer import AdapterOptimizer, ZeroAdamW, ZeroOptimizerState
from qlora_dist.parallel.loaded_model import OptimizerState, TrainableModel
from qlora_dist.parallel.mesh import CommCounter
from qlora_dist.runtime.device_memory import memory_budget_bytes
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.train.control_flags import ControlFlags
from qlora_dist.train.run_setup import RunSetup
from qlora_dist.train.step_profiler import OPTIMIZER_LABEL, STEP_LABEL


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """Model, optimizer and settings that stay the same from step to step."""

    model: PreTrainedModel
    shards: AdapterShards
    optimizer: AdapterOptimizer
    loss_scale: LossScale
    """Loss scale, which is 1 except for fp16."""
    adapter_replicas: int
    """Number of ranks that hold equal adapter shards."""
    max_grad_norm: float | None
    """Largest gradient norm after clipping; None: no clipping."""
    traffic: CommCounter


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Outcome of a step, equal on all ranks."""

    loss: float
    """Mean loss over the trained tokens of all ranks."""
    grad_norm: float
    """Norm of all adapters' gradients before clipping."""
    finite: bool
    """False if loss or gradient were not finite, so that the adapters were left unchanged."""
    flags: ControlFlags
    """Sums of the control flags over all ranks; zeros if none were given."""


def make_optimizer(shards: AdapterShards, states: OptimizerState, setup: RunSetup) -> AdapterOptimizer:
    """Return the optimizer of a rank's shards, which have values already."""
    config = setup.config.optim
    if isinstance(states, ZeroOptimizerState):
        return ZeroAdamW(shards.local, states, config)
    return PagedAdamW(
        shards.local,
        states,
        config,
        [config.lora_plus_ratio if is_b else 1.0 for is_b in shards.is_lora_b],
        lambda held: memory_budget_bytes(setup.device, held, setup.ranks.local_world_size),
    )


def make_step_context(setup: RunSetup, loaded: TrainableModel) -> StepContext:
    """Return what the steps of a run share, with the settings of its configuration."""
    return StepContext(
        model=setup.model,
        shards=loaded.adapter_shards,
        optimizer=make_optimizer(loaded.adapter_shards, loaded.optimizer_state, setup),
        loss_scale=LossScale(setup.config.model.compute_dtype),
        adapter_replicas=setup.sizes.adapter_replicas,
        max_grad_norm=setup.config.optim.max_grad_norm,
        traffic=loaded.traffic,
    )


@record_function(STEP_LABEL)
def train_step(
    context: StepContext,
    micro_batches: Sequence[Batch],
    loss_tokens: int,
    control_flags: Callable[[], ControlFlags] | None = None,
) -> StepResult:
    """Run forward and backward over the accumulation window, clip over all ranks, and update the adapters.

    The gradient is that of the summed loss of all trained tokens divided by their number, `loss_tokens`. Both are taken
    over all micro-batches of all ranks, so 1 rank with 4 sequences equals 4 ranks with 1. The engine sums gradients
    over ranks and does not divide them. They are communicated once, after the last micro-batch.

    `control_flags` returns this rank's flags, and is called as late as possible. One all-reduce sums them, the
    loss and the gradient norm.

    Raises:
        UserError: no adapter takes part in the loss.
    """
    shards, loss_scale, max_grad_norm = context.shards, context.loss_scale, context.max_grad_norm
    summed_loss = _accumulate_gradients(context, micro_batches, loss_tokens)

    grads = shards.collect_grads()
    squares = torch.stack(foreach_norm(grads)).double().square().sum() if grads else summed_loss.new_zeros(())
    squares.item()  # wait for the device, so that a request to stop that arrives during the step counts in this step
    own_flags = control_flags().to_list() if control_flags is not None else []
    flags = torch.tensor(own_flags, dtype=torch.float64).to(summed_loss.device)
    own = torch.stack([summed_loss, squares / context.adapter_replicas, *flags])
    total_loss, total_squares, *sums = context.traffic.all_reduce(own).tolist()

    norm = math.sqrt(total_squares) / loss_scale.value
    finite = math.isfinite(total_loss) and math.isfinite(norm)
    if finite:
        clip = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm is not None else 1.0
        foreach_mul_(grads, clip / loss_scale.value)
        with record_function(OPTIMIZER_LABEL):
            context.optimizer.step()
    shards.zero_grad()
    loss_scale.update(finite)
    summed_flags = ControlFlags.from_sums(sums) if sums else ControlFlags()
    return StepResult(loss=total_loss / loss_tokens, grad_norm=norm, finite=finite, flags=summed_flags)


def _accumulate_gradients(context: StepContext, micro_batches: Sequence[Batch], loss_tokens: int) -> torch.Tensor:
    """Run forward and backward over the micro-batches, and return this rank's summed loss in float64."""
    model, scale = context.model, context.loss_scale.value / loss_tokens
    summed_loss = torch.zeros((), dtype=torch.float64, device=micro_batches[0].input_ids.device)
    for index, batch in enumerate(micro_batches):
        model.set_requires_gradient_sync(index == len(micro_batches) - 1)
        loss = model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels)
        if not loss.requires_grad:
            raise UserError("lora.targets: no adapter has any influence on the loss; name other layers")
        (loss * scale).backward()
        summed_loss += loss.detach()
        record_heartbeat()
    return summed_loss


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Return a batch whose tensors are on a device."""
    return Batch(*(tensor.to(device) for tensor in batch))
