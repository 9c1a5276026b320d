"""If this fails, a GPU trains something else than a CPU. Skipped without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_models

GPUS = torch.cuda.device_count()


def losses(config: Path, name: str, launcher: list[str], *overrides: str) -> list[float]:
    """Train in new processes, because CUDA cannot be used in forked ones."""
    command = [sys.executable, *launcher, "-m", "qlora_dist", "train", str(config), f"run.name={name}", *overrides]
    subprocess.run(command, check=True, timeout=240)
    metrics = (config.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, metrics) if "loss" in row]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llama_nf4: Path) -> Path:
    return tiny_models.make_config(tmp_path_factory.mktemp("gpu"), tiny_llama_nf4, train__steps=4)


@pytest.mark.slow
@pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device")
@pytest.mark.parametrize("overrides", [(), ("parallel.offload=base",)])
def test_one_gpu_trains_as_the_cpu(overrides: tuple[str, ...], config: Path) -> None:
    on_cpu = losses(config, "cpu", [], "train.device=cpu", "run.overwrite=true")
    on_gpu = losses(config, "gpu", [], "train.device=cuda", "run.overwrite=true", *overrides)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)  # other kernels, perhaps in TF32


@pytest.mark.slow
@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("base", ["world", "replicate"])
def test_two_gpus_train_as_one(base: str, config: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    one = losses(config, "one", [], "train.device=cuda", "run.overwrite=true")
    two = losses(config, "two", torchrun, "train.device=cuda", "run.overwrite=true", f"parallel.base={base}")
    assert two == pytest.approx(one, rel=1e-4)
