"""The files of a run's folder, read for its report. No torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from qlora_dist.config.config_file import flatten_keys
from qlora_dist.errors import UserError
from qlora_dist.launch.run_status import RunState, is_finite_number, is_metrics_row, read_run_status
from qlora_dist.runs.json_object import parse_json_object, read_json_object
from qlora_dist.runs.run_dir import PROCESS_FILE

_WARM_UP_STEPS = 2
"""Steps that allocate memory and choose kernels. Medians leave them out if there are later steps."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Content of a run's files."""

    name: str
    path: Path
    state: RunState
    """State that `qlora-dist jobs` shows, without a query to SLURM."""
    steps: list[dict[str, Any]]
    """Rows of metrics.jsonl that belong to a step."""
    evals: list[tuple[int, float]]
    """Steps and held-out losses; step 0 is the base model alone."""
    summary: dict[str, Any]
    """Content of summary.json, which is empty until the run is done."""
    config: dict[str, Any]
    """Configuration by `section.key`."""
    process: dict[str, Any]
    """Content of process.json about rank 0's machine."""

    def series(self, *names: str, per_step: bool = False) -> list[float | None]:
        """Return one value for each step, or None where a row has none. `per_step` divides by the step's time."""
        values = []
        for row in self.steps:
            value: Any = row
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            if per_step and value is not None:
                value = value / row["step_s"] if row.get("step_s") else None
            values.append(value)
        return values

    def median(self, *names: str, per_step: bool = False) -> float | None:
        """Return the median over steps without the first two; None if there are no values."""
        values = [value for value in self.series(*names, per_step=per_step) if value is not None]
        return statistics.median(values[_WARM_UP_STEPS:] or values) if values else None

    def cumulative_tokens(self) -> list[int]:
        return list(accumulate(row.get("tokens") or 0 for row in self.steps))


def read_run_files(path: Path) -> RunFiles:
    """Read a run. Rows of metrics that are incomplete, or have other types, are left out.

    Raises:
        UserError: the folder holds no run, or its configuration cannot be read.
    """
    rows = _read_metrics(path / "metrics.jsonl")
    config_file = path / "config.yaml"
    try:
        tree = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: holds no run (no config.yaml); name a folder such as runs/my-run") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{config_file}: cannot be read ({error}); name another run") from None
    return RunFiles(
        name=path.resolve().name,
        path=path,
        state=read_run_status(path, None).state,
        steps=[row for row in rows if "loss" in row],  # evaluations before the first step have no loss
        evals=[(row["step"], row["eval_loss"]) for row in rows if isinstance(row.get("eval_loss"), float)],
        summary=_summary(path / "summary.json"),
        config=flatten_keys(tree if isinstance(tree, dict) else {}),
        process=read_json_object(path / PROCESS_FILE),
    )


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [row for row in map(parse_json_object, lines) if is_metrics_row(row)]


def _summary(path: Path) -> dict[str, Any]:
    """Return summary.json without values of types that no run writes."""
    kept = read_json_object(path)
    sizes, wall_s, plan = kept.get("static_bytes"), kept.get("wall_s"), kept.get("plan")
    if not (isinstance(sizes, list) and all(map(is_finite_number, sizes))):
        kept.pop("static_bytes", None)
    if not is_finite_number(wall_s):
        kept.pop("wall_s", None)
    if not (isinstance(plan, dict) and all(map(_is_number_pair, plan.values()))):
        kept.pop("plan", None)
    return kept


def _is_number_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(value is None or is_finite_number(value) for value in pair)
