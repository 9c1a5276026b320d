"""If this fails, ranks under DeepSpeed's launcher train something else, or do not start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.runs.run_dir import run_path
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.launchers import alive_pids, environment
from tests.helpers.ranks import free_port, run_ranks


def losses(config: Config) -> torch.Tensor:
    rows = map(json.loads, (run_path(config.run) / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([row["loss"] for row in rows if "loss" in row], dtype=torch.float64)


@pytest.mark.slow
def test_losses_are_the_same_under_the_deepspeed_launcher(tmp_path: Path, tiny_llama_nf4: Path) -> None:
    small = {"data__seq_len": 32, "data__eval": None, "train__global_batch": 4, "train__steps": 2}
    path = tiny_models.make_config(tmp_path, tiny_llama_nf4, **small)
    one = load_config(path, ["run.name=one", "train.micro_batch=2"])
    run_ranks(1, run_training, one)
    overrides = ["run.name=two", "parallel.engine=zero3", "optim.name=zero-adamw"]
    program = [Path(sys.executable).parent / "deepspeed", "--no_local_rank", "--num_gpus", "2"]
    program += ["--master_port", str(free_port()), "--module", "qlora_dist", "train", path, *overrides]
    environ = environment(tmp_path) | {"DS_ACCELERATOR": "cpu"}
    try:
        done = subprocess.run(program, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    finally:
        for pid in alive_pids(tmp_path):
            os.kill(pid, signal.SIGKILL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on cpu" in done.stdout
    torch.testing.assert_close(losses(load_config(path, overrides)), losses(one), rtol=1e-5, atol=0)
