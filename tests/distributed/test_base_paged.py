"""If this fails, a base that does not fit on its device trains something else than one that does, or does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from ranks import run_ranks

from qlora_dist.config import Config
from qlora_dist.config_file import load_config
from qlora_dist.train.run import train
from qlora_dist.train.run_dir import run_path

LAYERS = 8
PAGED = ("parallel.base=paged", "parallel.resident_bytes=0")  # room for two of eight layers: the model is 4 times as large


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("source") / "model", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def config(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qlora_dist.model.quantize_folder import quantize_folder
    from qlora_dist.model.quantize_plan import QuantizeOptions

    folder = tmp_path_factory.mktemp("paged")
    base = quantize_folder(source, folder / "nf4", QuantizeOptions()).out
    return tiny.make_config(
        folder, base, train__steps=3, train__global_batch=8, train__micro_batch=2, train__eval_every=2
    )


def metrics(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()]


def numbers(config: Config) -> list[list[float]]:
    """All that a run computes: losses, held-out losses, norms of gradients."""
    return [[row[key] for row in metrics(config) if key in row] for key in ("loss", "eval_loss", "grad_norm")]


def run_on(ranks: int, config: Path, *overrides: str) -> Config:
    resolved = load_config(config, [*overrides, f"run.name=run-{abs(hash((ranks, overrides)))}"])
    run_ranks(ranks, train, resolved)
    return resolved


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ()),
        (2, ()),
    ],
    ids=str,
)
def test_losses_are_those_of_a_base_that_fits(ranks: int, overrides: tuple[str, ...], config: Path) -> None:
    plain = run_on(ranks, config, "parallel.base=node", *overrides)
    paged = run_on(ranks, config, *PAGED, *overrides)
    assert numbers(paged) == numbers(plain)
    assert numbers(plain)[0][-1] < numbers(plain)[0][0]
