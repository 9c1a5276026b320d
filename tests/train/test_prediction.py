"""If this fails, a run predicts nothing, fails because of its prediction, or leaves a user to guess after an OOM."""

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


def test_only_planned_figures_are_compared() -> None:
    """The allocator's peak on a GPU is compared. A CPU process's peak is not, because it includes Python."""
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
    """Run the command line, with `room` bytes of address space left when the steps begin."""
    if room is not None:
        ctypes.CDLL(None).mallopt(-3, 2**18)  # M_MMAP_THRESHOLD: freed memory is returned at once, as on a device
        step = trainer.train_step

        def step_in_small_memory(*args, **kwargs):
            (used,) = re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
            resource.setrlimit(resource.RLIMIT_AS, (1024 * int(used) + room,) * 2)
            return step(*args, **kwargs)

        trainer.train_step = step_in_small_memory
    sys.argv = ["qlora-dist", "train", str(config), *overrides]
    main()


@pytest.fixture
def config(tmp_path: Path, tiny_llama_nf4: Path) -> Path:
    return tiny_models.make_config(tmp_path, tiny_llama_nf4, train__steps=2, data__eval=None, train__global_batch=4)


def test_a_run_prints_its_plan_and_compares_it_at_its_end(config: Path, tmp_path: Path) -> None:
    with started_ranks([partial(train, config)] * 2, tmp_path) as processes:
        for process in processes:
            process.join(60)
    printed = (tmp_path / "rank-0.txt").read_text()
    assert re.search(
        r"plan: each rank holds [\d.]+ KiB between steps and [\d.]+ \w+ in a layer's backward pass", printed
    )
    plan = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["plan"]
    labels = {
        "weights_bytes": "weights, rank 0",
        "moments_bytes": "optimizer states, rank 0",
        "world_bytes_per_step": "received per step, world",
    }
    for term, label in labels.items():
        planned, measured = plan[term]
        assert planned == measured, term
        assert re.search(rf"{label} +│ [\d.]+ KiB, as planned", printed), printed
    assert "peak_bytes" not in plan  # on a CPU the peak is the process's, which the plan does not include
    assert (
        "2 ranks on cpu: the base is sharded over all 2, adapters and optimizer states are sharded over all 2"
        in printed
    )
    assert printed.rstrip().endswith(
        f"try it: qlora-dist generate 'Your question' --adapter {tmp_path / 'runs/run/adapter'}"
    )


@pytest.mark.slow
def test_an_out_of_memory_error_names_settings_that_fit(config: Path, tmp_path: Path) -> None:
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
    assert [len(found) for found in answers] == [1, 1]  # the failing rank and the others print the same sentence
    assert answers[0] == answers[1]
    sizes = r"had ([\d.]+) MiB for tensors and needs ([\d.]+) MiB by its plan, .* in a layer's backward pass; set (.*)"
    available, needs, settings = re.search(sizes, answers[0][0]).groups()
    assert float(needs) > float(available)
    suggestions = re.findall(r"([a-z_.]+=\S+) \(([\d.]+) MiB\)", settings)
    assert [setting for setting, _ in suggestions][:2] == ["train.micro_batch=64", "data.seq_len=256"]
    assert all(1.2 * float(peak) < float(available) for _, peak in suggestions)
