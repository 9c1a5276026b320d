"""The table of figures at the beginning of a report. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_dist.plan.print_plan import term_label
from qlora_dist.report.run_files import RunFiles


def summarize_run(run: RunFiles) -> dict[str, Any]:
    """Return a run's progress, losses, speed, memory and waiting; None where a figure is unknown.

    Bytes are rank 0's unless the label says otherwise. Shares are fractions of a step's time.
    """
    traffic = [row["comm_bytes"] for row in run.steps if isinstance(row.get("comm_bytes"), dict)]
    received = [sum(value or 0 for value in by_dim.values()) for by_dim in traffic]
    peaks = [value for value in run.series("peak_bytes") if value is not None]
    return {
        "state": run.state,
        "steps": run.steps[-1]["step"] if run.steps else 0,
        "tokens": sum(row.get("tokens") or 0 for row in run.steps),
        "loss_last": run.steps[-1]["loss"] if run.steps else None,
        "eval_loss_first": run.evals[0][1] if run.evals else None,
        "eval_loss_last": run.evals[-1][1] if run.evals else None,
        "skipped_steps": sum(bool(row.get("skipped")) for row in run.steps),
        "tokens_per_s": run.median("tokens_per_s"),
        "step_s": run.median("step_s"),
        "data_share": run.median("data_s", per_step=True),
        "paging_share": run.median("paging", "stall_s", per_step=True),
        "base_paging_share": run.median("base_paging", "stall_s", per_step=True),
        "static_bytes": max(run.summary.get("static_bytes") or [], default=None),
        "peak_bytes": max(peaks, default=None),
        "comm_bytes": statistics.median(received) if received else None,
        "wall_s": run.summary.get("wall_s"),
    }


_LABELS = {
    "state": "state",
    "steps": "steps",
    "tokens": "tokens",
    "loss_last": "training loss, last step",
    "eval_loss_first": "held-out loss, before",
    "eval_loss_last": "held-out loss, last",
    "skipped_steps": "skipped steps",
    "tokens_per_s": "tokens/s, median",
    "step_s": "seconds a step, median",
    "data_share": "waiting for data",
    "paging_share": "waiting for pages of the optimizer",
    "base_paging_share": "waiting for pages of the base",
    "static_bytes": "held between steps, largest rank",
    "peak_bytes": "peak of rank 0",
    "comm_bytes": "received a step, rank 0",
    "wall_s": "seconds in all",
}


def report_rows(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Return the rows of the table: a label and a text for each run. Rows without any figure are left out."""
    columns = [summarize_run(run) for run in runs]
    return [
        (label, [_text(name, column[name]) for column in columns])
        for name, label in _LABELS.items()
        if any(column[name] is not None for column in columns)
    ]


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if name.endswith("_share"):
        return f"{100 * value:.1f} %"
    if "loss" in name:
        return f"{value:.4f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plan_comparison_rows(plan: Mapping[str, Sequence[float | None]]) -> list[tuple[str, str, str]]:
    """Return the label, the planned and the measured value of each term of `plan` in summary.json."""
    rows = []
    for term, (planned, measured) in plan.items():
        name = "plan_bytes" if "bytes" in term else term
        rows.append((term_label(term), _text(name, planned), _text(name, measured)))
    return rows


def split_config_keys(runs: Sequence[RunFiles]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Return the keys of the configurations that differ, with a text for each run, and the equal keys with theirs."""
    different, equal = [], []
    for key in dict.fromkeys(key for run in runs for key in run.config):
        texts = [str(run.config.get(key, "-")) for run in runs]
        if len(set(texts)) > 1:
            different.append((key, texts))
        else:
            equal.append((key, texts[0]))
    return different, equal
