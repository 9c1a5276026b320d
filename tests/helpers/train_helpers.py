"""Runs on real ranks, their results, and reference losses by plain autograd."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from qlora_dist.config.schema import Config
from qlora_dist.data.collate import Batch
from qlora_dist.runs.run_dir import run_path
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.train.console import RunConsole
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.run_training import train_and_export

PROMPT = torch.arange(3, 60).view(1, -1)


def train_and_get_logits(config: Config) -> np.ndarray:
    """Train, then return the sharded model's logits of PROMPT."""
    ranks = read_rank_info()
    setup = set_up_run(config, ranks)
    with RunConsole(1) as console, process_group(ranks, setup.device):
        train_and_export(setup, console)
        setup.model.eval()
        with torch.no_grad():
            logits = setup.model(input_ids=PROMPT, use_cache=False).logits
    return logits.float().numpy()  # a tensor would be shared memory of a process that has exited


def losses(config: Config) -> list[float]:
    return [row["loss"] for row in _metrics(config) if "loss" in row]


def eval_losses(config: Config) -> list[float]:
    return [row["eval_loss"] for row in _metrics(config) if row.get("eval_loss") is not None]


def _metrics(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()]


def adapter_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return |a - b| / |a| over all adapter weights together."""
    assert a.keys() == b.keys()
    difference = torch.cat([(a[k] - b[k]).flatten() for k in a]).double().norm()
    return float(difference / torch.cat([t.flatten() for t in a.values()]).double().norm())


def plain_losses(model: nn.Module, config: Config, steps: int) -> list[float]:
    """Train in one process by plain autograd with whole logits and torch's AdamW, and return the losses."""
    loader = set_up_run(config, read_rank_info({})).loader
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optim.lr, betas=(0.9, 0.999), weight_decay=0.0)
    result = []
    for step in range(steps):
        window = loader.micro_batches(step)
        tokens, total = sum(int((batch.labels != -100).sum()) for batch in window), 0.0
        for batch in window:
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        result.append(total)
    return result


def first_loss(config: Config, model: nn.Module) -> float:
    """Return the loss of transformers' model on the first step's batch, computed sequence by sequence."""
    return sequence_loss(model, set_up_run(config, read_rank_info({})).loader.micro_batches(0))


def sequence_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the loss of transformers' model per token of batches, computed sequence by sequence."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            for row, labels, positions in zip(*batch, strict=True):
                starts = (positions == 0).nonzero().flatten().tolist()
                for begin, end in zip(starts, [*starts[1:], len(row)], strict=True):
                    if (tokens := int((labels[begin:end] != -100).sum())) > 0:
                        logits = model(input_ids=row[None, begin:end], use_cache=False).logits[0].float()
                        total += float(cross_entropy(logits, labels[begin:end], reduction="sum"))
                        count += tokens
    return total / count
