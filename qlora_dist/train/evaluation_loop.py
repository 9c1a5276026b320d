"""Held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qlora_dist.data.collate import LABEL_IGNORE_INDEX, Batch
from qlora_dist.parallel.mesh import CommCounter
from qlora_dist.runtime.heartbeat import record_heartbeat


@dataclass
class EvalSums:
    """Progress of an evaluation on this rank."""

    batches: int = 0
    """Number of batches done, equal on all ranks."""
    loss: float = 0.0
    """Sum of the losses of this rank's trained tokens in these batches."""
    tokens: float = 0.0
    """Number of these tokens."""


def evaluate_model(model: PreTrainedModel, batches: Sequence[Batch], traffic: CommCounter) -> float:
    """Return the mean loss over the trained tokens of all ranks. Every rank has the same number of batches."""
    loss = evaluation_loop(model, batches, traffic, EvalSums(), lambda: False)
    assert loss is not None
    return loss


@torch.no_grad()
def evaluation_loop(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    traffic: CommCounter,
    sums: EvalSums,
    should_stop: Callable[[], bool],
) -> float | None:
    """Evaluate as `evaluate_model` does, from `sums` on; return None if `should_stop` interrupts it.

    `should_stop` is called before each batch, and returns the same on all ranks. `sums` is updated then.
    """
    totals = torch.tensor([sums.loss, sums.tokens], dtype=torch.float64, device=batches[0].input_ids.device)
    was_training = model.training
    model.eval()
    stopped = False
    for batch in batches[sums.batches :]:
        stopped = should_stop()
        if stopped:
            break
        totals[0] += model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels)
        totals[1] += (batch.labels != LABEL_IGNORE_INDEX).sum()
        sums.batches += 1
        record_heartbeat()
    model.train(was_training)
    if stopped:
        sums.loss, sums.tokens = totals.tolist()
        return None
    loss, tokens = traffic.all_reduce(totals).tolist()
    mean: float = loss / tokens
    return mean
