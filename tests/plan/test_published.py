"""If this fails, the planner's formulas no longer fit published runs, or the docs give other figures."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from qlora_dist.plan.plan_args import PlanArgs, plan_from_args

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_benchmark(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    return capsys.readouterr().out


def test_published_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = run_benchmark("published.py", monkeypatch, capsys)
    page = (BENCHMARKS.parent / "docs" / "planning.md").read_text()

    def errors(figure: str) -> tuple[float, float]:
        pattern = rf"^{re.escape(figure)}: (\d+) rows, median ([\d.]+)%, worst ([+-][\d.]+)%"
        match = re.search(pattern, output, re.MULTILINE)
        assert match, output[-1000:]
        rows, median, worst = match.groups()
        assert f"| {rows} | {median} % | {float(worst):+.{1 if abs(float(worst)) < 100 else 0}f} % |" in page, match[0]
        return float(median), abs(float(worst))

    median, worst = errors("static")
    assert median <= 2 and worst <= 5
    median, worst = errors("peak")
    assert median <= 10 and worst <= 25
    assert errors("tokens/s")[0] <= 20
    hits, rows = map(int, re.findall(r"whole logits twice of the predicted peak: (\d+) of (\d+)", output)[0])
    assert hits > rows / 2
    assert re.search(r"out of memory, predicted: (\d+) of \1 rows", output)


def test_figures_of_the_paper(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = run_benchmark("paper_figures.py", monkeypatch, capsys)
    errors = [float(error) for error in re.findall(r" GiB ([+-][\d.]+)%", output)]
    assert len(errors) == 4 and max(map(abs, errors)) < 2.5
    assert "0.127 bits a parameter; double quantization saves 3.02 GB at 65B" in output
    assert float(re.findall(r"65B: ([\d.]+) GiB with all states", output)[0]) < 48
    plan = plan_from_args(
        PlanArgs(
            model="llama-3.1-405b",
            overrides=["lora.r=16", "lora.dropout=0.0"],
            gpus=8,
            gpu="h100-80gb",
            nodes=1,
            network="infiniband-400g",
        )
    )
    peak = plan.memory.peak_bytes
    page = " ".join((BENCHMARKS.parent / "docs" / "planning.md").read_text().split())
    assert f"each rank needs {peak / 2**30:.1f} GiB at its peak (2048 tokens), {8 * peak / 1e9:.0f} GB together" in page
    assert "= 225.6 GB: a sum of states" in output and "= 255.5 GB: a sum of states" in output
