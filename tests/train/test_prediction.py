"""If this fails, a run says nothing of what it will need, fails because of that, or lets a user guess at an OOM."""

from __future__ import annotations

import ctypes
import json
import re
import resource
import sys
from functools import partial
from pathlib import Path

import pytest

from qlora_dist.cli.main import main
from qlora_dist.config.config_file import config_from_tree
from qlora_dist.plan.memory_estimate import MemoryEstimate
from qlora_dist.plan.model_config import read_model_config
from qlora_dist.plan.run_spec import make_run_spec
from qlora_dist.train import trainer
from qlora_dist.train.prediction import RunPrediction
from tests.helpers import tiny_models
from tests.helpers.ranks import started_ranks


def test_only_what_was_planned_is_compared() -> None:
    """On a GPU the allocator's peak is; on a CPU the process's, with Python and its libraries, is not."""
    measured = {
        "static_bytes": [100],
        "peak_bytes": [300],
        "comm_bytes_per_step": {"world": 7, "control": 88},
        "tokens_per_s": 50.0,
    }
    memory = MemoryEstimate({"base": 90, "moments": 10}, {"head": {"loss": 200}})
    terms = {}
    for device in ("cuda", "cpu"):
        config = config_from_tree({"model": {"base": "smollm2-135m"}, "data": {"train": ["a"]}})
        run = make_run_spec(config, read_model_config("smollm2-135m"), 1, device=device)
        terms[device] = RunPrediction(
            run=run, memory=memory, traffic={"world": 7}, tokens_per_s=None, is_measured=False
        ).compare_with(measured, 10)
    assert terms["cuda"].pop("peak_bytes") == [300, 300]
    assert terms["cuda"] == terms["cpu"]
    assert terms["cpu"]["moments_bytes"] == [10, 10] and terms["cpu"]["world_bytes_per_step"] == [7, 7]


def train(config: Path, *overrides: str, room: int | None = None) -> None:
    """The command line; with so many bytes of address space left when the steps begin."""
    if room is not None:
        ctypes.CDLL(None).mallopt(-3, 2**18)  # M_MMAP_THRESHOLD: what is freed is given back, as on a device
        step = trainer.train_step

        def in_a_small_room(*args, **kwargs):
            (used,) = re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
            resource.setrlimit(resource.RLIMIT_AS, (1024 * int(used) + room,) * 2)
            return step(*args, **kwargs)

        trainer.train_step = in_a_small_room
    sys.argv = ["qlora-dist", "train", str(config), *overrides]
    main()


@pytest.fixture
def config(tmp_path: Path, tiny_llama_nf4: Path) -> Path:
    return tiny_models.make_config(tmp_path, tiny_llama_nf4, train__steps=2, data__eval=None, train__global_batch=4)


def test_a_run_says_what_it_needs_and_what_it_needed(config: Path, tmp_path: Path) -> None:
    with started_ranks([partial(train, config)] * 2, tmp_path) as processes:
        for process in processes:
            process.join(60)
    said = (tmp_path / "rank-0.txt").read_text()
    assert re.search(r"plan: each rank holds [\d.]+ KiB between steps and [\d.]+ \w+ in a layer's backward pass", said)
    plan = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["plan"]
    labels = {
        "weights_bytes": "weights, rank 0",
        "moments_bytes": "optimizer states, rank 0",
        "world_bytes_per_step": "received per step, world",
    }
    for term, label in labels.items():
        planned, measured = plan[term]
        assert planned == measured, term
        assert re.search(rf"{label} +│ [\d.]+ KiB, as planned", said), said
    assert "peak_bytes" not in plan  # a CPU's peak is the process's, which no plan knows
    assert (
        "2 ranks on cpu: the base is sharded over all 2, adapters and optimizer states are sharded over all 2" in said
    )
    assert said.rstrip().endswith(
        f"try it: qlora-dist generate 'Your question' --adapter {tmp_path / 'runs/run/adapter'}"
    )


@pytest.mark.slow
def test_memory_that_runs_out_is_answered_with_what_would_have_fitted(config: Path, tmp_path: Path) -> None:
    big = ["data.seq_len=512", "train.micro_batch=128", "train.global_batch=256"]
    with started_ranks(
        [partial(train, config, *big), partial(train, config, *big, room=300 * 2**20)], tmp_path
    ) as ranks:
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [2, 2]
    outputs = [(tmp_path / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert not any("Traceback" in text for text in outputs)
    answers = [re.findall(r"out of memory: .*", text) for text in outputs]
    assert [len(found) for found in answers] == [1, 1]  # the rank itself, and what the others end with
    assert answers[0] == answers[1]
    sizes = r"had ([\d.]+) MiB for tensors and needs ([\d.]+) MiB by its plan, .* in a layer's backward pass; set (.*)"
    had, needs, settings = re.search(sizes, answers[0][0]).groups()
    assert float(needs) > float(had)
    found = re.findall(r"([a-z_.]+=\S+) \(([\d.]+) MiB\)", settings)
    assert [setting for setting, _ in found][:2] == ["train.micro_batch=64", "data.seq_len=256"]
    assert all(1.2 * float(peak) < float(had) for _, peak in found)
