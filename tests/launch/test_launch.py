"""If this fails, a job waits for hours in a queue and then fails with an error that was detectable before.

Or a dry run leaves files behind.
"""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.launch.cluster import Cluster
from qlora_dist.launch.job_check import check_job, estimate_static_bytes
from qlora_dist.launch.launch import LaunchOptions, LaunchTarget, launch_local, launch_slurm
from qlora_dist.launch.preflight import add_node_names, find_slow_nodes
from qlora_dist.parallel.mesh import mesh_sizes
from qlora_dist.plan.model_spec import make_model_spec
from qlora_dist.runtime.environment import RankInfo
from qlora_dist.runtime.process_exit import write_user_error_file
from qlora_dist.train.run_setup import set_up_model
from tests.helpers import tiny_models

CPU = Cluster(gpus_per_node=0, preprocess=True)


@pytest.fixture
def config(tmp_path: Path, tiny_llama_nf4: Path) -> Config:
    return load_config(tiny_models.make_config(tmp_path, tiny_llama_nf4))


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            **config.model_dump(),
            **{name: {**getattr(config, name).model_dump(), **keys} for name, keys in sections.items()},
        }
    )


def check(config: Config, cluster: Cluster = CPU, nodes: int = 2, ranks_per_node: int = 2) -> str:
    output = io.StringIO()
    check_job(config, cluster, nodes, ranks_per_node, Console(file=output, width=1000))
    return output.getvalue()


def test_the_static_part_is_that_of_the_shapes(config: Config) -> None:
    _, model, _ = set_up_model(config)
    sizes = mesh_sizes(
        config.parallel, RankInfo(rank=0, world_size=4, local_rank=0, local_world_size=2, launcher="none")
    )
    tree = json.loads((Path(config.model.base) / "config.json").read_text())
    parameters = [p for unit in make_model_spec(tree, config.lora).units for p in unit.parameters]
    base = sum(p.numel * (1 if p.is_quantized else 4) for p in parameters if not p.trained)  # compute_dtype: fp32
    adapters = sum(16 * p.numel for p in parameters if p.trained)
    assert estimate_static_bytes(model, sizes, config) == (base / 4, adapters / 4)


@pytest.mark.parametrize(
    ("sections", "cluster", "sentence"),
    [
        ({"train": {"global_batch": 6}}, {}, r"train\.global_batch: 6 is not a multiple of 4 \(4 ranks"),
        ({"parallel": {"base": 3}}, {}, r"parallel\.base: 3 does not divide the world of 4 ranks"),
        ({"model": {"base": "nowhere"}}, {}, "nowhere"),
        ({"lora": {"targets": ["q_porj"]}}, {}, "q_porj"),
        ({"data": {"train": ["./nowhere.jsonl"]}}, {}, r"nowhere\.jsonl: no such data file"),
        ({"data": {"train": ["./nowhere.jsonl"]}}, {"preprocess": False}, r"nowhere\.jsonl: no such data file"),
        ({}, {"gpu_memory": 1e-5}, r"a rank holds .* GiB between steps .* and a GPU has 1e-05; use more ranks"),
        ({}, {"gpu_memory": 2e-4}, r"needs .* GiB in a layer's backward pass, and a GPU has 0.0002; `qlora-dist plan"),
        ({}, {"gpus_per_node": 1}, "--ranks-per-node: 2 is more than the 1 GPUs of a node"),
    ],
)
def test_what_is_wrong_is_found_before_the_queue(
    sections: dict[str, Any], cluster: dict[str, Any], sentence: str, config: Config
) -> None:
    with pytest.raises(UserError, match=sentence):
        check(changed(config, **sections), CPU.model_copy(update=cluster))


def test_a_gpu_that_is_missing_here_is_no_error(config: Config) -> None:
    """The nodes have the GPUs, not the machine that submits."""
    output = check(
        changed(config, train={"device": "cuda"}), CPU.model_copy(update={"gpus_per_node": 8, "gpu_memory": 80.0})
    )
    assert "a rank holds" in output
    assert "plan: a rank needs" in output
    assert output.endswith("in a layer's backward pass\n")
    tight = CPU.model_copy(update={"preprocess": False, "gpu_memory": 0.3})
    assert check(config, tight).endswith("; with what the allocator adds that may not fit\n")
    zero = changed(config, parallel={"engine": "zero3", "base": "node"})
    assert "plan: none (parallel.engine: zero3: there are formulas for fsdp2 only" in check(zero, CPU)


def test_a_dry_run_prints_the_script_and_leaves_nothing(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    launch_slurm(config, CPU, LaunchOptions(nodes=2, dry_run=True), Console(quiet=True))
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n") and "\n#SBATCH --nodes=2\n" in script
    assert not (Path(config.run.dir) / "run").exists()
    assert not (Path(config.run.dir) / "run").exists()


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 1), (4, 4)])
def test_a_dry_run_here_prints_a_command_that_can_be_pasted(
    gpus: int, ranks: int, config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command names the user's file, because no other is written, and starts one rank per GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    output = io.StringIO()
    given = ("my run.yaml", "run.name=run")
    launch_local(config, "torchrun", LaunchOptions(dry_run=True, config_args=given), Console(file=output))
    words = shlex.split(capsys.readouterr().out)
    assert f"--nproc-per-node={ranks}" in words
    assert words[-3:] == ["train", *given]
    assert ("no GPU here: one rank; --ranks-per-node starts more" in output.getvalue()) == (gpus == 0)
    assert not (Path(config.run.dir) / "run").exists()


@pytest.mark.parametrize("on", ["torchrun", "mpi"])
def test_a_mistake_is_found_before_ranks_are_started(on: LaunchTarget, config: Config) -> None:
    """Otherwise forty lines of the launcher's output would follow the message."""
    wrong = changed(config, parallel={"base": 3})
    with pytest.raises(UserError, match=r"parallel\.base: 3 does not divide the world of 4 ranks"):
        launch_local(wrong, on, LaunchOptions(ranks_per_node=4), Console(quiet=True))
    assert not (Path(config.run.dir) / "run").exists()


def test_one_process_is_not_several_ranks(config: Config) -> None:
    with pytest.raises(UserError, match=r"--ranks-per-node: 2 ranks are more than the one process"):
        launch_local(config, "local", LaunchOptions(ranks_per_node=2), Console(quiet=True))


def test_without_slurm_a_sentence(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch: there is no such command; submit from a login node"):
        launch_slurm(config, CPU, LaunchOptions(nodes=2), Console(quiet=True))


def test_several_nodes_are_not_started_from_here(config: Config) -> None:
    with pytest.raises(UserError, match=r"--nodes: --on torchrun starts this machine's ranks alone"):
        launch_local(config, "torchrun", LaunchOptions(nodes=2), Console(quiet=True))


def test_a_user_error_is_written_for_the_script_and_a_lost_node_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_DIST_JOB", str(tmp_path))
    write_user_error_file(UserError("rank 3 did not join", retryable=True))
    assert not (tmp_path / "MISTAKE").exists()
    write_user_error_file(UserError("lora.r: is wrong"))
    assert (tmp_path / "MISTAKE").read_text() == "lora.r: is wrong\n"


def test_the_slow_node_is_named_and_not_its_neighbours() -> None:
    assert find_slow_nodes([(1.0, 1.1), (1.0, 9.0), (9.0, 9.0), (9.0, 1.0)]) == [2]
    assert find_slow_nodes([(1.0, 1.1), (1.0, 1.2)]) == []
    assert find_slow_nodes([(1.0, float("inf")), (1.0, 1.0), (1.0, 1.0)]) == []


def test_the_node_that_does_not_join_is_named() -> None:
    output = add_node_names("rank 1 (nor 1 more) of 3 did not join within 120 s", ["n1", "gpu-07", "n3"])
    assert output == "rank 1 (gpu-07) (nor 1 more) of 3 did not join within 120 s"
