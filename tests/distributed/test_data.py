"""If this fails, the number of ranks or micro-batches changes what is trained, or ranks wait for each other forever."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.optim.schedule import learning_rate
from qlora_dist.runs.run_dir import run_path
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks

MIXTURE = "data.train=[{path: FOLDER/train.jsonl, weight: 0.5}, {path: FOLDER/other.jsonl, weight: 1.5}]"
# each with pairs (ranks, rows of a micro-batch), which are compared with one rank and all twelve rows at once
LAYOUTS = {
    "all at once": [(2, 3)],
    "unpacked, lengths of a rank's own": [(2, 3), (4, 1)],
    "grouped by length": [(2, 6), (4, 3)],
    "a last batch of few rows": [(1, 3), (4, 1)],
    "split": [(1, 3), (4, 3)],
    "a mixture": [(1, 3), (2, 3)],
}
WAYS = {
    "all at once": [MIXTURE, "data.packing=none", "data.too_long=split", "train.steps=null", "train.epochs=0.9"],
    "unpacked, lengths of a rank's own": ["data.packing=none", "data.seq_len=256", "train.steps=4"],
    "grouped by length": ["data.packing=none", "data.group_by_length=true", "train.steps=4"],
    "a last batch of few rows": ["train.steps=null", "train.epochs=1.5", "optim.warmup_steps=1"],
    "split": ["data.too_long=split", "data.seq_len=24", "train.steps=4"],
    "a mixture": [MIXTURE, "train.steps=4"],
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, tiny_llama_nf4: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    path = tiny_models.make_config(folder, tiny_llama_nf4, data__seq_len=48)
    tiny_models.make_data(folder / "train.jsonl", 60, words=(1, 30))
    tiny_models.make_data(folder / "other.jsonl", 20, seed=2, words=(1, 8))
    return path


def make_config(path: Path, way: str, world_size: int, micro_batch: int) -> Config:
    name = f"{list(WAYS).index(way)}-{world_size}-{micro_batch}"
    overrides = [override.replace("FOLDER", str(path.parent)) for override in WAYS[way]]
    return load_config(path, [*overrides, f"train.micro_batch={micro_batch}", f"run.name={name}"])


def train_metrics(path: Path, way: str, world_size: int, micro_batch: int) -> list[dict[str, Any]]:
    config = make_config(path, way, world_size, micro_batch)
    run_ranks(world_size, run_training, config)
    return [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()]


def batch_shapes(path: Path, way: str, world_size: int, micro_batch: int) -> list[list[list[int]]]:
    """Return the length of each batch: [step][micro-batch][rank]."""
    config = make_config(path, way, world_size, micro_batch)
    setups = []
    for rank in range(world_size):
        names = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
        environ = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        setups.append(set_up_run(config, read_rank_info(environ)))
    windows = [[setup.loader.micro_batches(step) for setup in setups] for step in range(setups[0].steps)]
    return [
        [[batch.input_ids.shape[1] for batch in ranks] for ranks in zip(*window, strict=True)] for window in windows
    ]


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way == "all at once" else pytest.mark.slow) for way in WAYS]
)
def test_ranks_and_micro_batches_change_nothing(way: str, path: Path) -> None:
    one = train_metrics(path, way, 1, 12)
    for world_size, micro_batch in LAYOUTS[way]:
        other = train_metrics(path, way, world_size, micro_batch)
        assert len(other) == len(one)
        for key in ("loss", "eval_loss", "grad_norm", "tokens", "trained_tokens"):
            numbers, expected = ([row[key] for row in rows if key in row] for rows in (other, one))
            tolerance = 1e-4 if key == "grad_norm" else 1e-5
            assert numbers == pytest.approx(expected, rel=tolerance), (key, world_size, micro_batch)
    assert one[-1]["eval_loss"] < one[0]["eval_loss"]


def test_the_ways_differ(path: Path) -> None:
    """The test above would otherwise compare equal batches."""
    unpacked = batch_shapes(path, "unpacked, lengths of a rank's own", 2, 1)
    assert any(len(set(ranks)) > 1 for step in unpacked for ranks in step), "ranks with batches of different lengths"
    last = batch_shapes(path, "a last batch of few rows", 4, 1)
    assert {len(step) for step in last[:-1]} == {3}
    assert len(last[-1]) < 3, "what is empty on all ranks is left out"
    setup = set_up_run(make_config(path, "all at once", 1, 1), read_rank_info({}))
    (first, _), (second, _) = setup.loader.sources
    assert first.truncation_stats.split > 5
    rows = setup.loader.rows_per_epoch
    assert rows == 0.5 * len(first) + 1.5 * len(second)
    assert setup.steps == -(-round(0.9 * round(rows)) // 12)
    assert setup.loader.row_indices(setup.steps - 1).min() < 0, "the last batch is not full"


def test_warm_up_longer_than_the_run_is_cut(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (["train.steps=null", "train.epochs=1"], ["train.steps=5"]):
        config = load_config(path, [*steps, "optim.warmup_steps=30"])
        setup = set_up_run(config, read_rank_info({}), Console(soft_wrap=True))
        message = f"optim.warmup_steps: 30 is cut to the {setup.steps} steps of this run"
        assert message in capsys.readouterr().out
        assert learning_rate(setup.steps - 1, setup.steps, config.optim) == config.optim.lr


@pytest.mark.slow
def test_a_finished_runs_configuration_repeats_it(path: Path) -> None:
    way = "a last batch of few rows"
    first = train_metrics(path, way, 1, 4)
    folder = run_path(make_config(path, way, 1, 4).run)
    again = load_config(folder / "config.yaml", ["run.name=again"])
    run_ranks(1, run_training, again)
    second = [json.loads(line) for line in (folder.parent / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("loss") for row in second] == [row.get("loss") for row in first]


def train_or_refuse(config: Config, folders: list[Path]) -> str:
    os.chdir(folders[read_rank_info().rank])
    try:
        run_training(config)
    except UserError as error:
        return str(error)
    return "trained"


def test_ranks_that_have_read_other_data_refuse_to_start(path: Path, tmp_path: Path) -> None:
    """Two nodes have different files of one name."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, source in zip(folders, ("train.jsonl", "other.jsonl"), strict=True):
        folder.mkdir()
        shutil.copy(path.parent / source, folder / "rows.jsonl")
    config = load_config(path, ["train.micro_batch=1", "run.name=x", "data.train=[rows.jsonl]"])
    messages = run_ranks(2, train_or_refuse, config, folders)
    assert messages[0] == messages[1]
    assert "differs from rank 0" in messages[0] and "the content of data.train is sha256:" in messages[0]
    assert messages[0].endswith("; copy the same files to all nodes")
