"""Held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qlora_dist.data.collate import IGNORED, Batch
from qlora_dist.parallel.comm_counter import Traffic
from qlora_dist.runtime.heartbeat import beat


@dataclass
class EvalSums:
    """How far an evaluation is on this rank."""

    batches: int = 0
    """Batches that are done; equal on all ranks."""
    loss: float = 0.0
    """Sum of the losses of this rank's trained tokens in these batches."""
    tokens: float = 0.0
    """Number of these tokens."""


def evaluate(model: PreTrainedModel, batches: Sequence[Batch], traffic: Traffic) -> float:
    """Compute the mean loss over the trained tokens of all ranks' batches, of which every rank has equally many."""
    loss = evaluate_until(model, batches, traffic, EvalSums(), lambda: False)
    assert loss is not None
    return loss


@torch.no_grad()
def evaluate_until(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    traffic: Traffic,
    sums: EvalSums,
    interrupted: Callable[[], bool],
) -> float | None:
    """Evaluate as `evaluate` does, unless it is interrupted.

    Args:
        model: sharded and filled.
        batches: of this rank, on its device.
        traffic: counts the collective at the end.
        sums: where the evaluation begins or goes on; afterwards, how far it is.
        interrupted: asked before each batch, with the same answer on all ranks.

    Returns:
        The mean loss; None if the evaluation was interrupted.
    """
    totals = torch.tensor([sums.loss, sums.tokens], dtype=torch.float64, device=batches[0].input_ids.device)
    was_training = model.training
    model.eval()
    stopped = False
    for batch in batches[sums.batches :]:
        stopped = interrupted()
        if stopped:
            break
        totals[0] += model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels)
        totals[1] += (batch.labels != IGNORED).sum()
        sums.batches += 1
        beat()
    model.train(was_training)
    if stopped:
        sums.loss, sums.tokens = totals.tolist()
        return None
    loss, tokens = traffic.all_reduce(totals).tolist()
    mean: float = loss / tokens
    return mean
