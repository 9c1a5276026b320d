"""Command `qlora-dist train`: a run and its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qlora_dist.config.schema import Config
from qlora_dist.train.run_training import run_training


def train_and_report(config: Config, resume: str = "auto") -> None:
    """Train, and write the report of the finished run if `run.report` is set."""
    run_training(config, resume, _write_run_report if config.run.report else None)


def _write_run_report(path: Path, say: Callable[[str], None]) -> None:
    """Write the report. A failure is printed and does not fail the finished run."""
    try:
        from qlora_dist.report.write_report import write_report

        say(f"report: {write_report([path])}")
    except Exception as error:
        say(f"no report: {type(error).__name__}: {error}; try qlora-dist report {path}")
