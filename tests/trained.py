"""A run on real ranks, and what is left of it."""

from __future__ import annotations

import json

import numpy as np
import torch

from qlora_dist.config import Config
from qlora_dist.launch.environment import ranks_from_environment
from qlora_dist.parallel.process_group import process_group
from qlora_dist.train.console import RunConsole
from qlora_dist.train.run import run
from qlora_dist.train.run_dir import run_path
from qlora_dist.train.setup import set_up

PROMPT = torch.arange(3, 60).view(1, -1)


def train_and_give_logits(config: Config) -> np.ndarray:
    """Train, then run the sharded model on PROMPT: its logits."""
    ranks = ranks_from_environment()
    setup = set_up(config, ranks)
    with RunConsole(1) as console, process_group(ranks, setup.device):
        run(setup, console)
        setup.model.eval()
        with torch.no_grad():
            logits = setup.model(input_ids=PROMPT, use_cache=False).logits
    return logits.float().numpy()  # a tensor would be shared memory of a process that is gone


def losses(config: Config) -> list[float]:
    rows = [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
