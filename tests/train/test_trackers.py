"""If this fails, a tracker gets other numbers than metrics.jsonl, or ends a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.train.run_training import run_training
from qlora_dist.train.trackers import open_trackers
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks

SETTINGS = {"data__seq_len": 48, "train__steps": 2, "train__global_batch": 2, "run__trackers": ["tensorboard"]}


@pytest.mark.slow
def test_tensorboard_has_the_numbers_of_metrics_in_a_resumed_run_too(tmp_path: Path, tiny_llama_nf4: Path) -> None:
    config = tiny_models.make_config(tmp_path, tiny_llama_nf4, **SETTINGS)
    run_ranks(2, run_training, load_config(config, []))
    run_ranks(1, run_training, load_config(config, ["train.steps=3"]))
    run = tmp_path / "runs" / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for tag, values in (
        ("loss", [(row["step"], row["loss"]) for row in rows if "loss" in row]),
        ("eval_loss", [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]),
        ("comm_bytes/world", [(row["step"], row["comm_bytes"]["world"]) for row in rows[1:3]]),
    ):
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(dict(values))
    run_ranks(1, run_training, load_config(config, ["run.overwrite=true", "run.trackers=[]"]), "none")
    assert not (run / "tensorboard").exists()  # the replaced run's records are removed


def configuration(*names: str) -> Config:
    run = {"name": "run", "trackers": list(names)}
    return Config.model_validate({"model": {"base": "model"}, "data": {"train": ["data.jsonl"]}, "run": run})


def test_a_tracker_that_fails_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file in the place of a folder")
    lines: list[str] = []
    with open_trackers(configuration("tensorboard"), tmp_path, lines.append, is_new=True) as log:
        log({"step": 1, "loss": 2.0})
    assert len(lines) == 1 and lines[0].startswith("tensorboard: ") and "continues without it" in lines[0]


def test_a_missing_tracker_is_a_sentence(tmp_path: Path, tiny_llama_nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = SETTINGS | {"run__trackers": ["mlflow"]}
    config = load_config(tiny_models.make_config(tmp_path, tiny_llama_nf4, **settings), [])
    with pytest.raises(UserError, match=r"run\.trackers: mlflow is not installed; pip install mlflow"):
        run_training(config)
