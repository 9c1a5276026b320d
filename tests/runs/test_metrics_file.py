"""If this fails, metrics.jsonl has half a line or lacks steps after the disk was full for a moment."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.runs.metrics_file import MetricsFile


@contextmanager
def limit_disk_space(path: Path, more_bytes: int) -> Iterator[None]:
    """Limit the size of files of this process. A write is cut short at the limit, and the next one fails."""
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("more_bytes", [0, 7, 30])
def test_a_full_disk_leaves_whole_lines_and_loses_none(
    more_bytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, -1)
    expected: list[dict[str, Any]] = [{"step": step, "loss": step / 7} for step in range(9)]
    for row in expected[:3]:
        metrics.append(row)
    with limit_disk_space(path, more_bytes):
        metrics.extend_step(2, {"eval_loss": 0.123456789012345})
        for row in expected[3:6]:
            metrics.append(row)
        metrics.extend_step(5, {"eval_loss": 5.0})
        assert rows(path)[:2] == expected[:2]
        assert len(rows(path)) == 3
    assert capsys.readouterr().err.count("cannot be written") == 1
    for row in expected[6:]:
        metrics.append(row)
    expected[2]["eval_loss"], expected[5]["eval_loss"] = 0.123456789012345, 5.0
    assert rows(path) == expected
    metrics.close()
    assert rows(path) == expected


def test_remaining_lines_are_written_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", -1)
    with limit_disk_space(tmp_path / "metrics.jsonl", 0):
        metrics.append({"step": 1})
    assert "cannot be written" in capsys.readouterr().err
    metrics.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_resumed_run_keeps_the_steps_that_are_done(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    metrics = MetricsFile(path, 1)
    metrics.extend_step(1, {"eval_loss": 3.0})
    assert (metrics.last_value(1, "eval_loss"), metrics.last_value(2, "eval_loss")) == (3.0, None)
    metrics.extend_step(2, {"eval_loss": float("nan")})
    assert rows(path) == [{"step": 1, "loss": 2.0, "eval_loss": 3.0}, {"step": 2, "eval_loss": None}]
    assert metrics.values("loss") == [2.0]
    metrics.roll_back(1)
    metrics.append({"step": 2})
    assert rows(path)[1:] == [{"step": 2}]


@pytest.mark.parametrize("back_to", [1, 3, 5])
def test_a_rollback_while_the_disk_is_full_keeps_the_steps_before_it(
    back_to: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, -1)
    for step in range(1, 4):
        metrics.append({"step": step, "loss": 1.0})
    with limit_disk_space(path, 0):
        metrics.extend_step(3, {"eval_loss": 2.0})
        for step in range(4, 7):
            metrics.append({"step": step, "loss": 1.0})
        metrics.roll_back(back_to)
    for step in range(back_to + 1, 8):
        metrics.append({"step": step, "loss": 3.0})
    metrics.close()
    old = [{"step": step, "loss": 1.0, **({"eval_loss": 2.0} if step == 3 else {})} for step in range(1, back_to + 1)]
    assert rows(path) == [*old, *({"step": step, "loss": 3.0} for step in range(back_to + 1, 8))]
    assert "cannot be written" in capsys.readouterr().err
