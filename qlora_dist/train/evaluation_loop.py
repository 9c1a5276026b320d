"""Held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qlora_dist.data.collate import LABEL_IGNORE_INDEX, Batch
from qlora_dist.parallel.comm_counter import CommCounter
from qlora_dist.runtime.heartbeat import record_heartbeat


@dataclass
class EvalSums:
    """How far an evaluation is on this rank."""

    batches: int = 0
    """Batches that are done; equal on all ranks."""
    loss: float = 0.0
    """Sum of the losses of this rank's trained tokens in these batches."""
    tokens: float = 0.0
    """Number of these tokens."""


def evaluate_model(model: PreTrainedModel, batches: Sequence[Batch], traffic: CommCounter) -> float:
    """Compute the mean loss over the trained tokens of all ranks' batches, of which every rank has equally many."""
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
    """Evaluate as `evaluate_model` does, unless it is interrupted.

    Args:
        model: sharded and filled.
        batches: of this rank, on its device.
        traffic: counts the collective at the end.
        sums: where the evaluation begins or goes on; afterwards, how far it is.
        should_stop: asked before each batch, with the same answer on all ranks.

    Returns:
        The mean loss; None if the evaluation was interrupted.
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
