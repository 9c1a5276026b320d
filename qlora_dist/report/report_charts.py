"""The charts of a report, as one SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from markupsafe import Markup

from qlora_dist.report.panels import panels_to_svg
from qlora_dist.report.run_files import RunFiles

_MAX_POINTS = 800
"""Largest number of points of a line; neighbouring steps of a longer run are averaged."""
_LINE_STYLES = ("-", "--", ":", "-.")


@dataclass
class Chart:
    """A chart of lines over steps or tokens."""

    title: str
    unit: str
    lines: list[ChartLine] = field(default_factory=list)


@dataclass(kw_only=True)
class ChartLine:
    """A line of one run."""

    run: int
    """Number of the run, which selects its colour."""
    label: str
    x: list[float]
    y: list[float]
    style: str = "-"


def draw_charts(runs: Sequence[RunFiles]) -> Markup:
    """Return the charts of runs as a self-contained `<svg>` element, which is empty if no run has made a step."""
    panels = [partial(_plot_chart, chart, runs) for chart in make_charts(runs) if chart.lines]
    return panels_to_svg(panels, 2.6) if panels else Markup()


def _plot_chart(chart: Chart, runs: Sequence[RunFiles], axis: Any) -> None:
    for line in chart.lines:
        axis.plot(line.x, line.y, line.style, color=f"C{line.run}", linewidth=1, markersize=4, label=line.label)
    axis.set(title=chart.title, ylabel=chart.unit, xlabel="tokens" if _over_tokens(runs) else "step")
    if len(chart.lines) > 1:
        axis.legend()
    axis.grid(alpha=0.3)


def _over_tokens(runs: Sequence[RunFiles]) -> bool:
    """Return whether the runs' steps differ in their data, so that they are compared by tokens."""
    batch = ("train.global_batch", "data.seq_len", "data.packing", "data.train")
    return len({str([run.config.get(key) for key in batch]) for run in runs}) > 1


def make_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Make all charts of runs. A chart without lines is not drawn."""
    mib, percent = 1 / 2**20, 100.0
    memory = {
        "peak": ("peak_bytes",),
        "optimizer, resident": ("resident_bytes",),
        "optimizer, paged out": ("paged_bytes",),
        "layers, resident": ("base_resident_bytes",),
    }
    waiting = {"data": ("data_s",), "optimizer's pages": ("paging", "stall_s"), "layers": ("base_paging", "stall_s")}
    paged = {
        "optimizer, in": ("paging", "bytes_in"),
        "optimizer, out": ("paging", "bytes_out"),
        "layers, in": ("base_paging", "bytes_in"),
    }
    dims = sorted({dim for run in runs for row in run.steps for dim in (row.get("comm_bytes") or {})} - {"control"})
    loss = _chart(runs, "loss", "per trained token", {"training": ("loss",)})
    for number, run in enumerate(runs):
        if run.evals:
            tokens = [0, *run.cumulative_tokens()]
            x = [float(tokens[min(s, len(tokens) - 1)] if _over_tokens(runs) else s) for s, _ in run.evals]
            y = [value for _, value in run.evals]
            loss.lines.append(ChartLine(run=number, label=_label(runs, run, "held out"), x=x, y=y, style="o"))
    return [
        loss,
        _chart(runs, "gradient norm", "before clipping", {"": ("grad_norm",)}),
        _chart(runs, "throughput", "tokens/s, all ranks", {"": ("tokens_per_s",)}),
        _chart(runs, "memory of rank 0", "MiB", memory, mib),
        _chart(runs, "received by rank 0", "MiB a step", {dim: ("comm_bytes", dim) for dim in dims}, mib),
        _chart(runs, "waiting", "% of a step", waiting, percent, per_step=True),
        _chart(runs, "paged by rank 0", "MiB a step", paged, mib),
        _chart(runs, "learning rate", "", {"": ("lr",)}),
    ]


def _chart(
    runs: Sequence[RunFiles],
    title: str,
    unit: str,
    names: Mapping[str, tuple[str, ...]],
    scale: float = 1.0,
    *,
    per_step: bool = False,
) -> Chart:
    """Make a chart of some metrics of all runs. A metric that is always zero gets no line."""
    chart = Chart(title, unit)
    for number, run in enumerate(runs):
        steps: list[int] = run.cumulative_tokens() if _over_tokens(runs) else [row["step"] for row in run.steps]
        for index, (label, path) in enumerate(names.items()):
            points = [
                (x, y * scale)
                for x, y in zip(steps, run.series(*path, per_step=per_step), strict=True)
                if y is not None and math.isfinite(y)
            ]
            if any(y for _, y in points):
                x, y = _downsample(points)
                style = _LINE_STYLES[index % len(_LINE_STYLES)]
                chart.lines.append(ChartLine(run=number, label=_label(runs, run, label), x=x, y=y, style=style))
    return chart


def _label(runs: Sequence[RunFiles], run: RunFiles, label: str) -> str:
    """Return a line's label. A dollar sign is escaped because it would begin a formula."""
    words = [run.name] if len(runs) > 1 else []
    return " ".join([*words, *([label] if label else [])]).replace("$", r"\$")


def _downsample(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    size = -(-len(points) // _MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [group[-1][0] for group in groups], [sum(y for _, y in group) / len(group) for group in groups]
