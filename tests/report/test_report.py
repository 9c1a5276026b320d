"""If this fails, the page of a run shows wrong figures, needs a network, or is missing."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qlora_dist.cli.main import app
from qlora_dist.cli.train_command import train_and_report
from qlora_dist.config.config_file import load_config
from qlora_dist.errors import UserError
from qlora_dist.launch.run_status import read_run_status
from qlora_dist.report.report_charts import make_charts
from qlora_dist.report.report_table import summarize_run
from qlora_dist.report.run_files import read_run_files
from qlora_dist.report.write_report import write_report
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow

ODD: list[object] = ["text", [1], {"a": {"b": 1}}, True, float("nan"), 10**400]
"""Values that are no finite numbers."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama_nf4: Path) -> list[Path]:
    """Train two runs with different learning rates, and return their folders."""
    folder = tmp_path_factory.mktemp("report")
    config = tiny_models.make_config(folder, tiny_llama_nf4, train__steps=3, data__seq_len=48, train__global_batch=2)
    for name, lr, pages in (("first", 1e-2, "auto"), ("second", 1e-3, "0")):
        overrides = [f"run.name={name}", f"optim.lr={lr}", f"optim.resident_bytes={pages}", "run.report=true"]
        run_ranks(1, train_and_report, load_config(config, overrides))
    return [folder / "runs" / "first", folder / "runs" / "second"]


class ReportPage(HTMLParser):
    """Table cells, addresses and tags of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data.strip()

    def row(self, label: str, columns: int) -> list[str]:
        start = self.cells.index(label) + 1
        return self.cells[start : start + columns]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_page_of_a_run_shows_its_figures(runs: list[Path]) -> None:
    page, rows = ReportPage(runs[0] / "report.html"), metrics(runs[0])
    assert page.row("state", 1) == ["done"]
    assert page.row("steps", 1) == ["3"]
    assert page.row("tokens", 1) == [f"{sum(row.get('tokens', 0) for row in rows):,}"]
    assert page.row("training loss, last step", 1) == [f"{rows[-1]['loss']:.4f}"]
    assert page.row("held-out loss, before", 1) == [f"{rows[0]['eval_loss']:.4f}"]
    assert page.row("optim.lr", 1) == ["0.01"]
    measured = json.loads((runs[0] / "summary.json").read_text())["plan"]["weights_bytes"][1]
    assert page.row("weights, rank 0", 2)[1] == f"{measured / 2**20:,.1f} MiB"


def test_the_page_needs_no_network(runs: list[Path]) -> None:
    page = ReportPage(runs[0] / "report.html")
    assert all(address.startswith("#") for address in page.addresses)
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert not re.findall(r"url\((?!#)|@import", (runs[0] / "report.html").read_text())


def test_runs_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    done = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(out)])
    assert (done.exit_code, done.output) == (0, f"{out}\n")
    page = ReportPage(out)
    assert page.row("optim.lr", 2) == ["0.01", "0.001"]
    assert page.row("optim.resident_bytes", 2) == ["auto", "0"]
    losses = [f"{metrics(run)[-1]['loss']:.4f}" for run in runs]
    assert page.row("training loss, last step", 2) == losses
    assert page.cells.index("what differs") < page.cells.index("optim.lr") < page.cells.index("lora.r")
    assert page.row("lora.r", 1) == ["4"]


def test_chart_lines_are_the_metrics(runs: list[Path]) -> None:
    loss, norm = make_charts([read_run_files(run) for run in runs])[:2]
    for number, run in enumerate(runs):
        rows = [row for row in metrics(run) if "loss" in row]
        trained, held_out = (line for line in loss.lines if line.run == number)
        assert (trained.x, trained.y) == ([1, 2, 3], [row["loss"] for row in rows])
        assert held_out.x == [0, 3] and held_out.y[1] == rows[-1]["eval_loss"]
        assert norm.lines[number].y == [row["grad_norm"] for row in rows]


def test_long_runs_are_averaged_and_runs_with_other_batches_are_compared_by_tokens(runs: list[Path]) -> None:
    short = read_run_files(runs[0])
    rows = [{"step": step, "loss": float(step % 2), "tokens": 10} for step in range(1, 5001)]
    long = replace(short, name="long", steps=rows, evals=[], config=short.config | {"train.global_batch": 3})
    (line,) = (line for line in make_charts([short, long])[0].lines if line.run == 1)
    assert len(line.x) <= 800 and line.x[-1] == 50_000  # tokens
    assert max(line.y) - min(line.y) < 0.2


def test_figures_as_json(runs: list[Path]) -> None:
    done = CliRunner().invoke(app, ["report", *map(str, runs), "--json"])
    first, second = json.loads(done.output)
    rows = [row for row in metrics(runs[0]) if "loss" in row]
    assert (first["name"], first["loss_last"], first["config"]["optim.lr"]) == ("first", rows[-1]["loss"], 0.01)
    assert first["tokens_per_s"] == rows[2]["tokens_per_s"]  # the first two steps are warm-up
    assert second["eval_loss_last"] == metrics(runs[1])[-1]["eval_loss"]


def test_a_run_that_was_killed_has_a_page_too(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "<b>killed"
    run.mkdir()
    (run / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    text = (runs[0] / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: text.rindex('"loss"')])
    files = read_run_files(run)
    assert (summarize_run(files)["state"], summarize_run(files)["steps"]) == ("failed", 2)
    page = ReportPage(write_report([run]))
    assert page.row("state", 1) == ["failed"]
    assert "b" not in page.tags and any("<b>killed" in cell for cell in page.cells)
    (run / "metrics.jsonl").unlink()  # killed during loading
    assert ReportPage(write_report([run])).row("steps", 1) == ["0"]


def test_values_of_other_types_are_ignored(runs: list[Path], tmp_path: Path) -> None:
    """Check that rows that a user or another program adds to metrics.jsonl do not count as steps."""
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    valid = {**metrics(run)[-1], "step": 4}
    keys = ("step", "loss", "tokens", "lr", "comm_bytes", "paging")
    others: list[object] = [
        *({**valid, name: value} for name in keys for value in ODD),
        *({**valid, "comm_bytes": {"world": value}} for value in ODD),
        *(3, None, [], "text", {"step": 4}),
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in others)
        file.write("[" * 100_000 + "\n")
    assert read_run_files(run).steps == read_run_files(runs[0]).steps
    for name in ("static_bytes", "wall_s", "plan"):
        summary = json.loads((runs[0] / "summary.json").read_text())
        for value in (*ODD, {"term": 1}, {"term": ["x", None]}):
            (run / "summary.json").write_text(json.dumps({**summary, name: value}))
            assert summarize_run(read_run_files(run))["steps"] == 3
    assert ReportPage(write_report([run])).row("steps", 1) == ["3"]
    assert read_run_status(run, None).step == 3
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert (read_run_status(run, None).loss, read_run_files(run).steps) == (None, [])
    (run / "config.yaml").unlink()
    (run / "config.yaml").mkdir()
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read"):
        write_report([run])


def test_mistakes_are_user_errors(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        write_report([tmp_path])
    with pytest.raises(UserError, match="cannot be written"):
        write_report(runs, tmp_path / "no such folder" / "page.html")
