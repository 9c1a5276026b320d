"""If this fails, one bad batch ruins the adapters, or a run that cannot recover never stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.runs.run_dir import run_path
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.train.console import RunConsole
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.run_training import train_and_export
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks


def train_with_bad_steps(config: Config, bad_steps: tuple[int, ...]) -> str | None:
    """Train with an infinite loss on one rank at the bad steps. Return the message of the `UserError`, if any."""
    ranks = read_rank_info()
    setup = set_up_run(config, ranks)
    calls = 0
    window = setup.loader.micro_batches
    model_forward = setup.model.forward
    bad = False

    def watched(step: int) -> object:
        nonlocal bad
        bad = step in bad_steps and ranks.rank == 1
        return window(step)

    def forward(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = model_forward(*args, **kwargs)
        return loss * torch.inf if bad and torch.is_grad_enabled() else loss

    setup.loader.micro_batches = watched  # type: ignore[method-assign,assignment]
    setup.model.forward = forward
    with RunConsole(1) as console, process_group(ranks, setup.device):
        try:
            train_and_export(setup, console)
        except UserError as error:
            return str(error)
    assert calls > 0
    return None


def rows(config: Config) -> list[dict[str, float]]:
    lines = (run_path(config.run) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture
def config(tiny_llama_nf4: Path, tmp_path: Path) -> Config:
    return load_config(tiny_models.make_config(tmp_path, tiny_llama_nf4, train__steps=5, train__max_skipped_steps=2))


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(config: Config) -> None:
    assert run_ranks(2, train_with_bad_steps, config, (1, 3)) == [None, None]
    assert [row["skipped"] for row in rows(config)] == [False, True, False, True, False]
    for row in rows(config):
        assert row["skipped"] == (row["loss"] is None)  # JSON has no infinity
    summary = json.loads((run_path(config.run) / "summary.json").read_text())
    assert summary["skipped_steps"] == 2
    assert summary["eval_loss_last"] < summary["eval_loss_first"]


def test_too_many_in_a_row_end_the_run_with_a_sentence(config: Config) -> None:
    errors = run_ranks(2, train_with_bad_steps, config, (1, 2))
    assert errors[0] == errors[1]
    assert errors[0].startswith("step 3: the loss or gradient was not finite 2 times in a row; lower optim.lr")
