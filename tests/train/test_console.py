"""If this fails, a run that loads for an hour looks like one that hangs."""

from __future__ import annotations

import re
import sys

import pytest

from qlora_dist.io.read_ahead import ReadProgress
from qlora_dist.train import console
from qlora_dist.train.console import RunConsole

READINGS = [ReadProgress(2**20, 2**22, 0.0), ReadProgress(2**21, 2**22, 0.0), ReadProgress(2**22, 2**22, 0.0)]


def load(rank: int) -> None:
    with RunConsole(rank) as run_console:
        run_console.start_loading()
        for reading in READINGS:
            run_console.loaded(reading)
        run_console.log_loaded(2**19)


def test_lines_have_speed_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_LOAD_LINE_INTERVAL_S", 0.0)
    load(0)
    first, _, third, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"loading: 1.00 MiB of 4.00 MiB read by this rank, [\d.]+ GiB/s, 0 s left", first)
    assert third.startswith("loading: 4.00 MiB of 4.00 MiB")
    assert re.fullmatch(
        r"loaded: 4.00 MiB read by this rank in \d\.\d s, 0 % of it waiting for reads; it holds 512.00 KiB", last
    )


def test_a_short_load_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    load(0)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_LOAD_LINE_INTERVAL_S", 0.0)
    load(1)
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_a_bar_for_loading_and_one_for_the_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with RunConsole(0) as run_console:
        run_console.start_loading()
        for reading in READINGS:
            run_console.loaded(reading)
        run_console.start_steps(2)
        run_console.log_step(2, 1.0, 1e-4, 10.0, 2**20)
    out = capsys.readouterr().out
    assert "loading" in out and "4.2/4.2 MB" in out and "2/2" in out
