"""If this fails, ranks wait for one that has exited, or the message does not name it."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from qlora_dist.cli.main import main
from qlora_dist.errors import UserError
from qlora_dist.train import trainer
from tests.helpers import tiny_models
from tests.helpers.ranks import started_ranks

HOST = socket.gethostname()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tiny_llama_nf4: Path, tmp_path: Path) -> Path:
    """Return a run that would take far longer than the test."""
    steps = {"train__steps": 10**6, "train__global_batch": 6, "train__timeout": 5}
    return tiny_models.make_config(tmp_path, tiny_llama_nf4, data__eval=None, data__seq_len=32, **steps)


def train(*words: str | Path, at_step: int = -1, fault: Callable[[], None] | None = None) -> None:
    """Run the command line with a fault in the main thread after that many steps."""
    if fault is not None:
        step, done = trainer.train_step, 0

        def train_step(*args, **kwargs):
            nonlocal done
            if done == at_step:
                fault()
            done += 1
            return step(*args, **kwargs)

        trainer.train_step = train_step
    sys.argv = ["qlora-dist", "train", *map(str, words)]
    main()


def last_step(config: Path) -> int:
    metrics = config.parent / "runs" / "run" / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_for_step(config: Path, step: int) -> None:
    end = time.monotonic() + 60
    while last_step(config) < step:
        assert time.monotonic() < end
        time.sleep(0.05)


def exit_codes(processes: list[BaseProcess], within_s: float) -> list[int | None]:
    end = time.monotonic() + within_s
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return [process.exitcode for process in processes]


def qlora_dist_lines(path: Path, rank: int) -> list[str]:
    """Return what the run wrote to stderr."""
    return [line for line in rank_output(path, rank).splitlines() if line.startswith("qlora-dist: ")]


def rank_output(path: Path, rank: int) -> str:
    return (path / f"rank-{rank}.txt").read_text()


def test_a_run_that_succeeds_prints_no_error(config, tmp_path):
    with started_ranks([partial(train, config, "train.steps=3")] * 2, tmp_path) as processes:
        assert exit_codes(processes, within_s=40) == [0, 0]
    assert not qlora_dist_lines(tmp_path, 0) + qlora_dist_lines(tmp_path, 1)
    assert "[c10d]" not in rank_output(tmp_path, 1)  # rank 0, which holds the store, has exited last


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "victim"), [(2, 0), (3, 1)])
def test_a_killed_rank_is_named_within_seconds(config, tmp_path, world_size, victim):
    with started_ranks([partial(train, config)] * world_size, tmp_path) as processes:
        wait_for_step(config, 3)
        os.kill(processes[victim].pid, signal.SIGKILL)
        survivors = [rank for rank in range(world_size) if rank != victim]
        assert set(exit_codes([processes[rank] for rank in survivors], within_s=6)) == {1}
    (sentence,) = [line for rank in survivors for line in qlora_dist_lines(tmp_path, rank)]
    assert re.match(rf"qlora-dist: rank {victim} on {HOST} went away after step \d+ \(\w+", sentence)
    assert not any("Traceback" in rank_output(tmp_path, rank) for rank in survivors)


@pytest.mark.slow
def test_a_stopped_rank_is_named_within_the_timeout(config, tmp_path):
    with started_ranks([partial(train, config)] * 2, tmp_path) as processes:
        wait_for_step(config, 3)
        os.kill(processes[1].pid, signal.SIGSTOP)
        assert exit_codes([processes[0]], within_s=7) == [1]
        os.kill(processes[1].pid, signal.SIGCONT)  # so that it exits too
        assert exit_codes(processes, within_s=5) == [1, 1]
    (sentence,) = qlora_dist_lines(tmp_path, 0)
    assert re.match(rf"qlora-dist: rank 1 on {HOST} was stopped by a signal after step \d+ \(\w+", sentence)


@pytest.mark.slow
def test_a_run_that_is_suspended_as_a_whole_continues(config, tmp_path):
    with started_ranks([partial(train, config, "train.timeout=3")] * 2, tmp_path) as processes:
        wait_for_step(config, 3)
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(4)
        before = last_step(config)
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)
        time.sleep(2)
        wait_for_step(config, before + 1)
        assert [process.exitcode for process in processes] == [None, None]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_stack(config, tmp_path):
    hanging = partial(train, config, at_step=3, fault=lambda: time.sleep(1000))
    with started_ranks([partial(train, config), hanging], tmp_path) as processes:
        wait_for_step(config, 3)
        assert exit_codes(processes, within_s=9) == [1, 1]
    (sentence,) = qlora_dist_lines(tmp_path, 0)
    assert re.match(rf"qlora-dist: rank 1 on {HOST} has made no progress for \d s after step 3 \(training\)", sentence)
    assert "File" not in rank_output(tmp_path, 0)
    (stack,) = qlora_dist_lines(tmp_path, 1)
    assert stack == "qlora-dist: [rank 1] is here:"
    assert "time.sleep(1000)" in rank_output(tmp_path, 1)
    assert "threading.py" not in rank_output(tmp_path, 1)  # the stack is the main thread's


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_one_traceback(config, tmp_path, rank):
    failing = partial(train, config, at_step=3, fault=partial(fail, ValueError("seven is no prime\nof course")))
    ranks = [partial(train, config), failing]
    with started_ranks(ranks if rank == 1 else ranks[::-1], tmp_path) as processes:
        assert exit_codes(processes, within_s=30) == [1, 1]
    assert rank_output(tmp_path, rank).count("Traceback") == 1
    assert "ValueError: seven is no prime" in rank_output(tmp_path, rank)
    assert "Traceback" not in rank_output(tmp_path, 1 - rank)
    (sentence,) = qlora_dist_lines(tmp_path, 1 - rank)
    failed = "failed after step 3 (training): ValueError: seven is no prime; its traceback is in its output"
    assert sentence == f"qlora-dist: rank {rank} on {HOST} {failed}"


def test_the_same_mistake_on_all_ranks_is_one_sentence(config, tmp_path):
    mistaken = partial(train, config, at_step=3, fault=partial(fail, UserError("seven is no prime; take another")))
    with started_ranks([mistaken] * 2, tmp_path) as processes:
        assert exit_codes(processes, within_s=30) == [2, 2]
    assert qlora_dist_lines(tmp_path, 0) == ["qlora-dist: seven is no prime; take another"]
    assert qlora_dist_lines(tmp_path, 1) == []


@pytest.mark.parametrize("alone", [False, True])
def test_a_mistake_that_one_rank_finds_ends_the_others(config, tmp_path, alone):
    fault = partial(fail, UserError("seven is no prime; take another", local_only=alone))
    with started_ranks([partial(train, config), partial(train, config, at_step=3, fault=fault)], tmp_path) as processes:
        assert exit_codes(processes, within_s=30) == [2, 2]
    assert qlora_dist_lines(tmp_path, 0) == [
        f"qlora-dist: rank 1 on {HOST} has stopped: seven is no prime; take another"
    ]
    assert qlora_dist_lines(tmp_path, 1) == (["qlora-dist: [rank 1] seven is no prime; take another"] if alone else [])
