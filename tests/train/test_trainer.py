"""If this fails, a run ignores a request to stop or save, repeats a bad batch, or trains adapters of the wrong size."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_dist.adapters.attach import attach_adapter
from qlora_dist.checkpoint.manifest import find_checkpoints
from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.runs.run_dir import CHECKPOINTS_DIR, run_path
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.train import run_setup, run_training, trainer
from qlora_dist.train.console import RunConsole
from qlora_dist.train.control_flags import STOP_REASONS, ControlFlags
from qlora_dist.train.run_setup import set_up_model, set_up_run
from qlora_dist.train.step_metrics import StepMetrics
from qlora_dist.train.stop_requests import SAVE_FILE, STOP_FILE, STOP_SIGNALS
from qlora_dist.train.train_step import StepContext, StepResult
from qlora_dist.train.trainer import Trainer, TrainResult
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks

Action = Callable[[Path], None]
"""A function of the run's folder."""


def train(config: Config, during: dict[int, Action], bad_calls: tuple[int, ...] = ()) -> TrainResult:
    """Train in one process, and return the trainer's result.

    Args:
        during: actions before the calls of `train_step` with these numbers, from 0; -1: before the trainer starts.
        bad_calls: calls of `train_step` whose loss is not finite.
    """
    step, calls, results = trainer.train_step, 0, []
    path = run_path(config.run)

    def counted_step(context: StepContext, *args: Any) -> StepResult:
        nonlocal calls
        during.get(calls, lambda path: None)(path)
        forward = context.model.forward
        if calls in bad_calls:
            context.model.forward = lambda **inputs: forward(**inputs) * torch.inf
        calls += 1
        try:
            return step(context, *args)
        finally:
            context.model.forward = forward

    class RecordingTrainer(Trainer):
        def train(self, run_started: float | None = None) -> TrainResult:
            during.get(-1, lambda path: None)(path)
            results.append(super().train(run_started))
            return results[-1]

    trainer.train_step = counted_step
    run_training.Trainer = RecordingTrainer  # type: ignore[misc]
    setup = set_up_run(config, read_rank_info())
    with RunConsole(1) as console, process_group(setup.ranks, setup.device):
        run_training.train_and_export(setup, console)
    return results[0]


def rows(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()]


def checkpoint_steps(config: Config) -> list[int]:
    return sorted(
        int(folder.name.split("-")[-1]) for folder in find_checkpoints(run_path(config.run) / CHECKPOINTS_DIR)
    )


@pytest.fixture
def config(tiny_llama_nf4: Path, tmp_path: Path) -> Config:
    steps = {"train__steps": 6, "train__save_every": 2, "train__keep_checkpoints": 9, "train__global_batch": 2}
    return load_config(tiny_models.make_config(tmp_path, tiny_llama_nf4, data__seq_len=32, **steps))


def test_the_run_reaches_its_last_step(config: Config) -> None:
    (result,) = run_ranks(1, train, config, {})
    assert (result.stop_reason, result.progress.step) == (None, 6)
    assert len(result.tokens_per_s) == len(result.stall_shares) == 6
    assert checkpoint_steps(config) == [2, 4, 6]
    first, *steps, last = rows(config)
    assert set(first) == {"step", "eval_loss"}
    unpaged = {field.name for field in dataclasses.fields(StepMetrics)} - {"base_paging", "base_resident_bytes"}
    assert all(set(row) == unpaged - {"eval_loss"} for row in steps)
    assert set(last) == unpaged
    assert result.progress.eval_losses == [first["eval_loss"], last["eval_loss"]]


def touch(name: str) -> Action:
    return lambda path: (path / name).touch()


def test_the_stop_file_ends_the_run_after_its_step_with_a_checkpoint(config: Config) -> None:
    (result,) = run_ranks(1, train, config, {2: touch(STOP_FILE)})
    assert (result.stop_reason, result.progress.step) == ("STOP", 3)
    assert checkpoint_steps(config) == [2, 3]
    assert not (run_path(config.run) / STOP_FILE).exists()
    (resumed,) = run_ranks(1, train, config, {})
    assert (resumed.stop_reason, resumed.progress.step, len(resumed.tokens_per_s)) == (None, 6, 3)
    assert [row["step"] for row in rows(config)] == list(range(7))


def test_a_request_before_the_first_step_stops_the_run_at_once(config: Config) -> None:
    (result,) = run_ranks(1, train, config, {-1: touch(STOP_FILE)})
    assert (result.stop_reason, result.progress.step, rows(config)) == ("STOP", 0, [])
    assert not (run_path(config.run) / STOP_FILE).exists()


def test_the_save_file_adds_a_checkpoint_and_the_run_continues(config: Config) -> None:
    (result,) = run_ranks(1, train, config, {2: touch(SAVE_FILE)})
    assert (result.stop_reason, result.progress.step) == (None, 6)
    assert checkpoint_steps(config) == [2, 3, 4, 6]
    assert not (run_path(config.run) / SAVE_FILE).exists()


def test_a_bad_batch_is_left_out_after_a_rollback(config: Config) -> None:
    rollback = config.train.model_copy(update={"on_spike": "rollback"})
    config = config.model_copy(update={"train": rollback})
    (result,) = run_ranks(1, train, config, {}, (3,))
    progress = result.progress
    assert (progress.step, progress.left_out, progress.skipped_steps, progress.optimizer_steps) == (6, [3], 0, 6)
    assert len(result.tokens_per_s) == 7  # step 3 was done twice
    assert [row["step"] for row in rows(config)] == list(range(7))


def test_a_bad_batch_without_rollback_is_skipped(config: Config) -> None:
    (result,) = run_ranks(1, train, config, {}, (3,))
    progress = result.progress
    assert (progress.step, progress.left_out, progress.skipped_steps, progress.optimizer_steps) == (6, [], 1, 5)
    assert [row["step"] for row in rows(config) if row.get("skipped")] == [4]


def test_flags_keep_their_names_through_the_sum() -> None:
    own = [ControlFlags(sigterm=1, checkpoints_written=1), ControlFlags(sigterm=1, checkpoints_failed=1, save_file=1)]
    sums = torch.tensor([flags.to_list() for flags in own], dtype=torch.float64).sum(0).tolist()
    expected = ControlFlags(sigterm=2, checkpoints_written=1, checkpoints_failed=1, save_file=1)
    assert ControlFlags.from_sums(sums) == expected
    with pytest.raises(ValueError, match="zip"):
        ControlFlags.from_sums(sums[1:])


def test_the_first_reason_to_stop_is_reported() -> None:
    assert ControlFlags(save_file=1, checkpoints_written=2, checkpoints_failed=2).stop_reason is None
    for flag, reason in STOP_REASONS.items():
        assert ControlFlags(**{flag: 1}).stop_reason == reason
    assert ControlFlags(max_time=1, sigterm=1).stop_reason == "SIGTERM"
    assert set(STOP_REASONS.values()) == {*STOP_SIGNALS, "STOP", "max_time"}


def test_adapters_of_another_size_are_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def attach_too_large(model: Any, adapter: Any, **options: Any) -> None:
        attach_adapter(model, adapter.__class__(**adapter.to_dict() | {"r": 5}), **options)

    set_up_model(config)
    monkeypatch.setattr(run_setup, "attach_adapter", attach_too_large)
    with pytest.raises(
        UserError, match=r"^lora: the adapters have [\d,]+ elements, and their 21 matrices need [\d,]+;"
    ):
        set_up_model(config)
