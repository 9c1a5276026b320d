"""If this fails, a job never completes an evaluation that is longer than its grace period.

A run may also end without a checkpoint because its terminal was closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_dist.checkpoint.manifest import find_checkpoints
from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.runs.run_dir import REQUEUE_MARKER, STOPPED_MARKER, RunDir, run_path
from qlora_dist.train import evaluation_loop
from qlora_dist.train.run_training import run_training
from qlora_dist.train.stop_requests import STOP_FILE, install_signal_handlers
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
EVAL_ROWS = 24


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llama_nf4: Path) -> Path:
    folder = tmp_path_factory.mktemp("interruptions")
    steps = {"train__steps": 4, "train__save_every": 2, "train__eval_every": 2, "train__global_batch": 2}
    path = tiny_models.make_config(folder, tiny_llama_nf4, data__packing="none", **steps)
    tiny_models.make_data(folder / "eval.jsonl", EVAL_ROWS, seed=1)
    return path


def resolve(config: Path, name: str, *overrides: str) -> Config:
    return load_config(config, [f"run.name={name}", *overrides])


def metrics(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()]


def curves(config: Config) -> list[tuple[Any, ...]]:
    return [(row["step"], row.get("loss"), row.get("eval_loss")) for row in metrics(config)]


def adapter(config: Config) -> dict[str, torch.Tensor]:
    return load_file(run_path(config.run) / "adapter" / "adapter_model.safetensors")


def at_batch(number: int, action: Any) -> None:
    """Do something in this process after that many batches of evaluations, and after each further one."""
    beat, batches = evaluation_loop.record_heartbeat, 0

    def counted(*args: Any) -> None:
        nonlocal batches
        beat(*args)
        batches += 1
        if batches >= number:
            action(batches - number)

    evaluation_loop.record_heartbeat = counted  # type: ignore[attr-defined]


def train_until(config: Config, number: int, way: str) -> None:
    """End in an evaluation: by SIGTERM and a grace of one batch, or by SIGKILL once the checkpoint is complete."""

    def end(batches_later: int) -> None:
        if way == "TERM":
            os.kill(os.getpid(), {0: signal.SIGTERM, 1: signal.SIGCONT}.get(batches_later, signal.SIGKILL))
        elif find_checkpoints(run_path(config.run) / "checkpoints"):
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            time.sleep(0.1)

    install_signal_handlers()
    at_batch(number, end)
    run_training(config)


@pytest.mark.parametrize(
    ("ranks", "starts"),
    [
        # 24 batches: once in the first evaluation, and twice in the one after step 2
        (1, [(10, "TERM"), (18, "KILL"), (3, "TERM")]),
        # 12 batches on each rank
        pytest.param(2, [(5, "TERM"), (9, "TERM")], marks=pytest.mark.slow),
    ],
)
def test_a_run_gets_past_an_evaluation_that_is_longer_than_the_grace(
    ranks: int, starts: list[tuple[int, str]], config: Path
) -> None:
    whole, run = resolve(config, f"whole-{ranks}"), resolve(config, f"interrupted-{ranks}")
    run_ranks(ranks, run_training, whole)
    reached = []
    for number, way in starts:
        with contextlib.nullcontext() if way == "TERM" else pytest.raises(RuntimeError, match="the process died"):
            run_ranks(ranks, train_until, run, number, way)
        if way == "TERM":
            marker = json.loads((run_path(run.run) / REQUEUE_MARKER).read_text())
            assert marker["reason"] == "SIGTERM"
            reached.append(
                (marker["step"], json.loads((run_path(run.run) / "evaluation.json").read_text())["ranks"][0][0])
            )
    batches = EVAL_ROWS // ranks
    done = starts[0][0] + starts[1][0] - batches
    # a killed start loses its sums, and the next one begins the evaluation anew; step 2 stays done
    assert reached == [(0, starts[0][0]), (2, 3)] if ranks == 1 else [(0, 5), (2, done)]
    run_ranks(ranks, run_training, run)
    assert curves(run) == curves(whole)
    assert all(torch.equal(adapter(run)[name], tensor) for name, tensor in adapter(whole).items())
    assert not (run_path(run.run) / "evaluation.json").exists()


def train_and_stop(config: Config, step: int) -> None:
    log = RunDir.log

    def logged(self: RunDir, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] == step:
            (self.path / STOP_FILE).touch()

    RunDir.log = logged  # type: ignore[method-assign]
    run_training(config)


def train_with_a_stop_file(config: Config) -> None:
    run_path(config.run).mkdir(parents=True, exist_ok=True)
    (run_path(config.run) / STOP_FILE).touch()
    run_training(config)


def test_a_run_that_was_stopped_at_what_is_now_its_last_step_is_evaluated(config: Path) -> None:
    settings = ("train.eval_every=0", "optim.schedule=constant", "optim.warmup_steps=0", "train.save_every=0")
    short = resolve(config, "short", *settings, "train.steps=3")
    run_ranks(1, run_training, short)
    run_ranks(1, train_with_a_stop_file, resolve(config, "stopped", *settings))
    run = run_path(resolve(config, "stopped").run)
    assert json.loads((run / STOPPED_MARKER).read_text()) == {"step": 0, "reason": "STOP"}
    assert not (run / STOP_FILE).exists(), "it was obeyed, and would stop each start"
    run_ranks(1, train_and_stop, resolve(config, "stopped", *settings), 2)
    assert json.loads((run / STOPPED_MARKER).read_text()) == {"step": 3, "reason": "STOP"}
    (run / STOP_FILE).touch()
    os.utime(run / STOP_FILE, (time.time() - 10**6,) * 2)  # older than this start
    stopped = resolve(config, "stopped", *settings, "train.steps=3")
    run_ranks(1, run_training, stopped)
    assert curves(stopped) == curves(short)
    expected, summary = (json.loads((run_path(c.run) / "summary.json").read_text()) for c in (short, stopped))
    for key in ("eval_loss_first", "eval_loss_last"):
        assert summary[key] == expected[key]
    assert summary["eval_loss_first"] != summary["eval_loss_last"]
    assert summary["tokens_per_s"] > 0
    assert summary["wall_s"] > sum(row.get("step_s", 0) for row in metrics(stopped))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_run_continues_without_its_output_and_a_hangup_saves(config: Path) -> None:
    """The interpreter is a new one, which must not fail at its exit either."""
    run = resolve(config, "hung-up", "train.steps=1000000", "train.save_every=0", "train.eval_every=0")
    command = [sys.executable, "-m", "qlora_dist", "train", str(config), "run.name=hung-up", "train.steps=1000000"]
    command += ["train.save_every=0", "train.eval_every=0"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=full)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        end = time.monotonic() + 200
        while True:
            with contextlib.suppress(OSError, IndexError):
                if metrics(run)[-1]["step"] > 2:
                    break
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
        assert process.wait(100) == 0
    finally:
        process.kill()
        process.wait()
    marker = json.loads((run_path(run.run) / REQUEUE_MARKER).read_text())
    assert marker["reason"] == "SIGHUP"
    assert [path.name for path in find_checkpoints(run_path(run.run) / "checkpoints")] == [f"step-{marker['step']:06d}"]
    assert metrics(run)[-1]["step"] == marker["step"]
    lost = (run_path(run.run) / "output-lost.txt").read_text()
    assert "stdout cannot be written (Broken pipe)" in lost
