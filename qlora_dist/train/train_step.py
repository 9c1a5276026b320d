"""One optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import record_function
from transformers import PreTrainedModel

from qlora_dist.adapters.attach import is_lora_b_parameter, named_trainable_parameters
from qlora_dist.compat.torch import foreach_mul_, foreach_norm
from qlora_dist.data.collate import Batch
from qlora_dist.errors import UserError
from qlora_dist.optim.loss_scale import LossScale
from qlora_dist.parallel.comm_counter import CommCounter
from qlora_dist.parallel.deepspeed_optimizer import AdapterOptimizer
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.shard_view import get_flat_shard, local_tensor, pop_local_grad
from qlora_dist.train.step_profiler import OPTIMIZER_LABEL, STEP_LABEL


@dataclass(frozen=True)
class StepResult:
    """What a step did; equal on all ranks."""

    loss: float
    """Mean over the trained tokens of the window, all ranks together."""
    grad_norm: float
    """Of all adapters together, before clipping."""
    finite: bool
    """False: the adapters were left as they were."""
    sums: list[float]
    """Of `told` over all ranks."""


class AdapterShards:
    """The adapters' local shards as plain parameters that alias the engine's.

    An optimizer of plain tensors is faster than one of DTensors, and bitsandbytes' kernels know nothing else.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in named_trainable_parameters(model)]
        self._sharded = [p for _, p in named_trainable_parameters(model)]
        self._had_grad = [False] * len(self._sharded)
        self.local = [nn.Parameter(local_tensor(p).detach()) for p in self._sharded]
        self.is_lora_b = [is_lora_b_parameter(name) for name, _ in named_trainable_parameters(model)]

    def collect_grads(self) -> list[torch.Tensor]:
        """Hand the engine's gradients over to the local shards; those of empty shards are left out.

        An adapter that takes no part in the loss has no gradient, and zeros stand for it: B stays zero.
        """
        for index, (sharded, local) in enumerate(zip(self._sharded, self.local, strict=True)):
            gradient, flat = pop_local_grad(sharded), get_flat_shard(sharded)
            self._had_grad[index] |= gradient is not None if flat is None else flat.had_grad
            local.grad = (torch.zeros_like(local) if gradient is None else gradient) if local.numel() else None
        return [p.grad for p in self.local if p.grad is not None]

    def find_unused_parameters(self) -> list[str]:
        """Return the names of parameters that no rank has had a gradient for. Called on all ranks after a step."""
        device = self.local[0].device
        found = torch.tensor(self._had_grad, dtype=torch.int32, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [name for name, had in zip(self._names, found.tolist(), strict=True) if not had]

    def zero_grad(self) -> None:
        """Forget them."""
        for local in self.local:
            local.grad = None


@record_function(STEP_LABEL)
def train_step(
    model: PreTrainedModel,
    micro_batches: Sequence[Batch],
    loss_tokens: int,
    shards: AdapterShards,
    adapter_replicas: int,
    optimizer: AdapterOptimizer,
    loss_scale: LossScale,
    max_grad_norm: float | None,
    traffic: CommCounter,
    control_flags: Callable[[], Sequence[float]] = tuple,
) -> StepResult:
    """Forward and backward over the accumulation window, clip over the whole world, update.

    The gradient is that of (sum of the losses of all trained tokens) / (their number), over all micro-batches of all
    ranks: 1 rank x 4 sequences is 4 ranks x 1. The engine sums gradients over ranks and divides nothing.

    Args:
        model: sharded; its gradients are communicated once, after the last micro-batch.
        micro_batches: this rank's micro-batches.
        loss_tokens: of all ranks' windows together.
        shards: the adapters of this rank.
        adapter_replicas: ranks that hold equal adapter shards.
        optimizer: over the shards.
        loss_scale: for fp16.
        max_grad_norm: None: no clipping.
        traffic: counts the one collective that is not the model's.
        control_flags: returns what else is summed in the same collective; called as late as possible.

    Raises:
        UserError: no adapter takes part in the loss.
    """
    device = micro_batches[0].input_ids.device
    summed_loss = torch.zeros((), dtype=torch.float64, device=device)
    for index, batch in enumerate(micro_batches):
        model.set_requires_gradient_sync(index == len(micro_batches) - 1)
        loss = model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels)
        if not loss.requires_grad:
            raise UserError("lora.targets: no adapter has any influence on the loss; name other layers")
        (loss * (loss_scale.value / loss_tokens)).backward()
        summed_loss += loss.detach()
        record_heartbeat()

    grads = shards.collect_grads()
    squares = torch.stack(foreach_norm(grads)).double().square().sum() if grads else summed_loss.new_zeros(())
    squares.item()  # waits for the device, so that a request to stop that comes during the step is seen in this step
    flags = torch.tensor(control_flags(), dtype=torch.float64).to(device)
    own = torch.stack([summed_loss, squares / adapter_replicas, *flags])
    total_loss, total_squares, *sums = traffic.all_reduce(own).tolist()

    norm = math.sqrt(total_squares) / loss_scale.value
    finite = math.isfinite(total_loss) and math.isfinite(norm)
    if finite:
        clip = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm is not None else 1.0
        foreach_mul_(grads, clip / loss_scale.value)
        with record_function(OPTIMIZER_LABEL):
            optimizer.step()
    shards.zero_grad()
    loss_scale.update(finite)
    return StepResult(total_loss / loss_tokens, norm, finite, sums)


def adapter_shard_numels(model: nn.Module) -> list[int]:
    """Elements of each of this rank's adapter shards, in the order of `AdapterShards`; the model may be on meta."""
    return [local_tensor(parameter).numel() for _, parameter in named_trainable_parameters(model)]
