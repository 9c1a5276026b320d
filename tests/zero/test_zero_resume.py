"""If this fails, a run cannot change its engine, or resumes with wrong weights or optimizer states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_dist.checkpoint.manifest import find_checkpoints, read_manifest
from qlora_dist.checkpoint.resharding import FLAT_DIM
from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.runs.run_dir import RunDir, run_path
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks

STEPS_PER_RUN = 2
"""Steps under one engine."""


def train_and_stop(config: Config, step: int) -> None:
    """Train, and request a stop when the metrics of a step are written. The run stops after the next step."""
    log = RunDir.log

    def logged(self: RunDir, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] == step:
            (run_path(config.run) / "STOP").touch()

    RunDir.log = logged  # type: ignore[method-assign]
    run_training(config)


def losses(config: Config) -> torch.Tensor:
    rows = map(json.loads, (run_path(config.run) / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([row["loss"] for row in rows if "loss" in row], dtype=torch.float64)


@pytest.mark.slow
def test_a_run_can_change_its_engine_and_ranks(tmp_path: Path, tiny_llama_nf4: Path) -> None:
    config = tiny_models.make_config(tmp_path, tiny_llama_nf4)

    def resolve(name: str, *overrides: str) -> Config:
        common = [f"run.name={name}", f"train.steps={4 * STEPS_PER_RUN}", "train.eval_every=0", "train.save_every=0"]
        return load_config(config, [*common, *overrides])

    def config_for(engine: str, base: str | int, optimizer: str = "paged-adamw-32bit") -> Config:
        changes = f"parallel.engine={engine}", f"parallel.base={base}", f"optim.name={optimizer}"
        return resolve("changing", *changes, "train.micro_batch=3")

    changing = [
        (2, config_for("fsdp2", "world")),
        (4, config_for("zero3", "world", "zero-adamw")),
        (2, config_for("zero2", 1)),
        (1, config_for("fsdp2", 1)),
    ]
    for index, (ranks, resolved) in enumerate(changing):
        if index < len(changing) - 1:
            run_ranks(ranks, train_and_stop, resolved, (index + 1) * STEPS_PER_RUN - 1)
        else:
            run_ranks(ranks, run_training, resolved)
        newest = read_manifest(find_checkpoints(run_path(resolved.run) / "checkpoints")[0])
        assert newest.step == (index + 1) * STEPS_PER_RUN
        assert {cut.dim == FLAT_DIM for cut in newest.cuts.values()} == {resolved.parallel.engine != "fsdp2"}
    uninterrupted = resolve("uninterrupted", "train.micro_batch=6")
    run_ranks(1, run_training, uninterrupted)
    assert len(losses(uninterrupted)) == 4 * STEPS_PER_RUN
    torch.testing.assert_close(losses(changing[0][1]), losses(uninterrupted), rtol=1e-5, atol=0)
