"""Held-out loss of a loaded model, as `train` computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Console

from qlora_dist.data.collate import Batch
from qlora_dist.data.dataloader import eval_batches
from qlora_dist.data.prepare_datasets import prepare_datasets
from qlora_dist.errors import UserError
from qlora_dist.inference.inference_model import InferenceModel
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.runtime.object_collectives import all_gather_json
from qlora_dist.train.evaluation_loop import evaluate_model
from qlora_dist.train.run_setup import check_token_ids


@dataclass(frozen=True)
class EvalLoss:
    """Loss of a model on held-out data."""

    loss: float
    """Mean over the trained tokens of all rows, in nats."""
    tokens: int
    """Number of trained tokens."""

    @property
    def perplexity(self) -> float:
        """exp(loss), or infinity if that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def compute_eval_loss(loaded: InferenceModel, data: str, console: Console | None = None) -> EvalLoss:
    """Compute the loss with the active adapter, by the run's templates, masks and packing. Call it on all ranks.

    `data` is a file, folder or data set, read by the keys `data.*` of `loaded.config`. Tokenizing is silent without a
    console.
    """
    batches, tokens = load_eval_batches(loaded, data, console)
    record_heartbeat(phase="evaluating")
    return EvalLoss(evaluate_model(loaded.model, batches, loaded.traffic), tokens)


def load_eval_batches(loaded: InferenceModel, data: str, console: Console | None = None) -> tuple[list[Batch], int]:
    """Return this rank's batches, and the number of trained tokens over all ranks."""
    config = loaded.config
    eval_data_config = config.data.model_copy(update={"train": [], "eval": data})
    source = prepare_datasets(eval_data_config, loaded.load_tokenizer(), console).eval
    assert source is not None
    check_token_ids(loaded.folder, loaded.model, [source])
    if len(set(all_gather_json(source.stats.sha256))) > 1:
        raise UserError(f"{data}: is not the same on all ranks; copy the same file to all nodes")
    rows, ranks = source.dataset, loaded.ranks
    batches = eval_batches(rows, micro_batch=config.train.micro_batch, rank=ranks.rank, world_size=ranks.world_size)
    return [Batch(*(t.to(loaded.device) for t in batch)) for batch in batches], int(rows.row_loss_tokens.sum())
