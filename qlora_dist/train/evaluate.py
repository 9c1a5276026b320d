"""Held-out loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from qlora_dist.data.rows import IGNORED, Batch
from qlora_dist.parallel.traffic import Traffic
from qlora_dist.train.beat import beat


@torch.no_grad()
def evaluate(model: PreTrainedModel, batches: Sequence[Batch], traffic: Traffic) -> float:
    """Mean loss over the trained tokens of all ranks' batches; every rank has as many batches as the others."""
    device = batches[0].input_ids.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for batch in batches:
        totals[0] += model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels)
        totals[1] += (batch.labels != IGNORED).sum()
        beat()
    model.train(was_training)
    loss, tokens = traffic.all_reduce(totals).tolist()
    return loss / tokens
