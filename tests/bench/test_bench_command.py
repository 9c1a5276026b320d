"""If this fails, a layout's figures differ from its runs, diverging losses go unnoticed, or mistakes are found late."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.bench.bench_layouts import BenchCase, ModelBytes, make_bench_cases
from qlora_dist.bench.bench_result import BenchResult
from qlora_dist.bench.compare_losses import compare_losses
from qlora_dist.cli import bench_command
from qlora_dist.cli.main import main
from qlora_dist.config.config_file import load_config
from qlora_dist.report.run_files import RunFiles, read_run_files
from tests.helpers import tiny_models
from tests.helpers.warm_python import warm_python

RUNS = ["single-paged-1", "fsdp2-1", "fsdp2-2", "two-mesh-2"]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Return a function that runs `bench` in this process, and returns exit code, stdout and stderr."""

    def call(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qlora-dist", "bench", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return (int(caught.value.code or 0), *capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llama_nf4: Path) -> Path:
    return tiny_models.make_config(
        tmp_path_factory.mktemp("bench"), tiny_llama_nf4, train__global_batch=4, lora__dropout=0.1
    )


@pytest.mark.slow
def test_bench_compares_layouts_from_runs_to_files(
    cli: Cli, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compare = ["--compare", "single-paged,fsdp2,two-mesh", "--ranks", "1,2", "--quick"]
    with warm_python(out.parent) as python:
        monkeypatch.setattr(sys, "executable", str(python))
        monkeypatch.setenv("PYTHON_EXEC", str(python))  # the interpreter that torchrun starts ranks with
        code, stdout, stderr = cli(config, *compare, "--out", out, "--json", out.parent / "too.json")
        assert (code, stderr) == (0, ""), stdout
        # the error message of a run is the message of the command
        missing = cli(
            config, "data.train=[none.jsonl]", "--compare", "fsdp2", "--ranks", "1", "--out", out.parent / "2"
        )
    assert missing[0] == 2
    assert missing[2].startswith("qlora-dist: fsdp2 on 1 rank: ") and "none.jsonl" in missing[2]

    text = (out / "bench.json").read_text()
    assert (out.parent / "too.json").read_text() == text
    result = BenchResult.model_validate_json(text, strict=True)
    assert [f"{f.layout}-{f.ranks}" for f in result.layouts] == RUNS
    assert [(left.layout, left.ranks) for left in result.left_out] == [("two-mesh", 1)]
    assert "left out: two-mesh on 1 rank: two nodes need an even number of ranks" in stdout
    assert result.machine.device == "cpu" and {"torch", "Python"} < set(result.machine.versions)
    assert not any(figures.nodes for figures in result.layouts)
    reference = result.layouts[0].losses
    for name, figures in zip(RUNS, result.layouts, strict=True):
        run, summary = (
            read_run_files(out / "runs" / name),
            json.loads((out / "runs" / name / "summary.json").read_text()),
        )
        assert figures.static_bytes == summary["static_bytes"] and len(figures.static_bytes) == figures.ranks
        assert figures.received_bytes_per_step == summary["comm_bytes_per_step"] == run.steps[-2]["comm_bytes"]
        assert figures.read_bytes == summary["read_bytes"]
        assert figures.losses == [row["loss"] for row in run.steps] == pytest.approx(reference, rel=1e-5)
        # one warm-up step, two timed steps, one profiled step
        assert len(run.steps) == 4 and figures.timed_steps == 2
        speeds = sorted(row["positions"] / row["step_s"] for row in run.steps[1:3])
        assert [figures.positions_per_s.least, figures.positions_per_s.most] == pytest.approx(speeds)
        assert all(row["positions"] == 4 * 96 > row["tokens"] > row["trained_tokens"] for row in run.steps)
        assert min(figures.step_shares.values()) >= 0
        assert sum(figures.step_shares.values()) == pytest.approx(1)
        assert sum(figures.step_split_s.values()) == pytest.approx(figures.step_s.median)
        assert min(figures.step_shares[kind] for kind in ("dequantization", "optimizer", "data", "compute")) > 0
    paged, one, two, two_mesh = result.layouts
    assert paged.step_shares["paging"] > 0 == two.step_shares["paging"]
    assert paged.paged_bytes_per_step["base"] > 0 < paged.paged_bytes_per_step["optimizer"]
    assert paged.static_bytes[0] < one.static_bytes[0]
    assert set(two.received_bytes_per_step) == {"world", "control"}
    assert two_mesh.received_bytes_per_step["world"] < two.received_bytes_per_step["world"]
    assert (
        f"| {' | '.join(f'{figures.losses[-1]:.6f}' for figures in result.layouts)} |" in (out / "bench.md").read_text()
    )
    page = (out / "bench.html").read_text()
    assert not re.findall(r"<script|<link|<img|url\((?!#)|@import|href=\"(?!#)", page)
    assert all(f"<td>{figures.losses[-1]:.6f}</td>" in page for figures in result.layouts)
    assert all((out / f"{name}.png").stat().st_size > 1000 for name in ("throughput", "scaling", "split", "memory"))
    check_disagreeing_losses(cli, config, out, result, monkeypatch)


def check_disagreeing_losses(
    cli: Cli, config: Path, out: Path, result: BenchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a changed loss in one of the runs is reported."""

    def read_with_changed_loss(case: BenchCase, folder: Path) -> RunFiles:
        run = read_run_files(out / "runs" / case.name)
        factor = 1 + 3e-5 * (case.ranks == 2)
        return replace(run, steps=[*run.steps[:-1], {**run.steps[-1], "loss": run.steps[-1]["loss"] * factor}])

    monkeypatch.setattr(bench_command, "run_local_job", read_with_changed_loss)
    args = ["--compare", "fsdp2", "--ranks", "1,2", "--repeats", "1", "--out", out.parent / "changed"]
    code, _, stderr = cli(config, *args)
    assert code == 1
    assert stderr.startswith(
        "qlora-dist: The losses do not agree: fsdp2 on 2 ranks differs by 3.0e-05 relative to fsdp2-1"
    )
    changed = BenchResult.model_validate_json((out.parent / "changed" / "bench.json").read_text())
    assert not changed.losses.agree and result.losses.agree
    assert changed.losses.by == "step"
    assert 0 < changed.layouts[1].loss_difference_of_mean < 2e-5
    in_16_bit = compare_losses("fsdp2-1", "bf16", changed.layouts)
    assert in_16_bit.by == "mean" and in_16_bit.agree


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--compare", "fsdp2,two-mehs"], "--compare: two-mehs: unknown layout; did you mean two-mesh?"),
        (["--compare", ","], "--compare: names no layout; give some of single-paged, fsdp2, two-mesh, zero3"),
        (["--ranks", "1,two"], "--ranks: 1,two: should be numbers of ranks such as 1,2,4"),
        (["--ranks", "3"], "train.global_batch: 4 is not a multiple of 3 (3 ranks x train.micro_batch: 1); use 3 or 6"),
        (["--compare", "two-mesh", "--ranks", "1"], "bench: nothing is left to compare"),
    ],
)
def test_mistakes(cli: Cli, config: Path, args: list[str], sentence: str) -> None:
    code, _, stderr = cli(config, *args, "--out", config.parent / "none")
    assert code == 2
    assert sentence in stderr and stderr.count("\n") == 1
    assert not (config.parent / "none").exists()


def test_layouts_override_the_configuration(config: Path) -> None:
    def make_configs(*overrides: str, layers: int = 8, ranks: int = 4) -> dict[str, dict[str, Any]]:
        sizes = ModelBytes([1000] * layers, 10**6)
        names = ["single-paged", "fsdp2", "two-mesh"]
        cases, _ = make_bench_cases(load_config(config, overrides), names, [ranks], sizes)
        return {case.layout: case.config.model_dump() for case in cases}

    configs = make_configs(
        "parallel.engine=zero3", "optim.name=zero-adamw", "parallel.adapter=node", "parallel.offload=base"
    )
    assert {tree["parallel"]["engine"] for tree in configs.values()} == {"fsdp2"}
    assert {tree["optim"]["name"] for tree in configs.values()} == {"paged-adamw-32bit"}
    assert {(t["parallel"]["adapter"], t["parallel"]["offload"]) for t in configs.values()} == {("world", "none")}
    bases = [configs[name]["parallel"]["base"] for name in ("single-paged", "fsdp2", "two-mesh")]
    assert bases == ["paged", "world", 2]
    assert configs["single-paged"]["parallel"]["resident_bytes"] == 2000  # a quarter, and two layers
    assert 2 * configs["single-paged"]["paging"]["page_bytes"] == pytest.approx(10**6 / 4, rel=0.05)
    assert make_configs(layers=40)["single-paged"]["parallel"]["resident_bytes"] == 10_000
    # all layouts have 8-bit moments if the configuration has
    assert make_configs("optim.name=adamw-8bit")["single-paged"]["optim"]["name"] == "paged-adamw-8bit"
    assert "single-paged" not in make_configs(layers=2)
    assert make_configs(ranks=2)["two-mesh"]["parallel"]["base"] == 1
