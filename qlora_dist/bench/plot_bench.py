"""The charts of a comparison: PNG files, and one SVG for its page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qlora_dist.bench.bench_result import BenchResult
from qlora_dist.bench.bench_table import MIB, layout_labels
from qlora_dist.report.panels import MATPLOTLIB_SETTINGS, draw_panels, panels_to_svg, stack_bars


def save_bench_plots(result: BenchResult, folder: Path) -> list[Path]:
    """Write each chart to a PNG file, and return the files."""
    import matplotlib

    files = []
    with matplotlib.rc_context(MATPLOTLIB_SETTINGS):
        for name, panel in _PANELS.items():
            files.append(folder / f"{name}.png")
            draw_panels([partial(panel, result=result)], 6.5, 4, columns=1).savefig(files[-1], dpi=150)
    return files


def draw_bench_svg(result: BenchResult) -> Markup:
    """Return all charts as a self-contained `<svg>` element."""
    return panels_to_svg([partial(panel, result=result) for panel in _PANELS.values()], 10 / 3)


def _plot_throughput(axis: Any, result: BenchResult) -> None:
    spreads = [figures.tokens_per_s for figures in result.layouts]
    medians = [spread.median for spread in spreads]
    below = [spread.median - spread.least for spread in spreads]
    above = [spread.most - spread.median for spread in spreads]
    axis.bar(range(len(medians)), medians, yerr=[below, above], capsize=3)
    _label_axis(axis, result, "throughput: median, least and most", "tokens/s, all ranks")


def _plot_scaling(axis: Any, result: BenchResult) -> None:
    for layout in dict.fromkeys(figures.layout for figures in result.layouts):
        points = [(f.ranks, f.tokens_per_s) for f in result.layouts if f.layout == layout]
        x, medians = [ranks for ranks, _ in points], [spread.median for _, spread in points]
        below = [spread.median - spread.least for _, spread in points]
        above = [spread.most - spread.median for _, spread in points]
        axis.errorbar(x, medians, yerr=[below, above], marker="o", markersize=4, capsize=3, label=layout)
    axis.set(title="throughput against ranks", xlabel="ranks", ylabel="tokens/s, all ranks", ylim=(0, None))
    axis.set_xticks(sorted({figures.ranks for figures in result.layouts}))
    axis.grid(alpha=0.3)
    axis.legend()


def _plot_step_split(axis: Any, result: BenchResult) -> None:
    kinds = result.layouts[0].step_split_s
    stack_bars(axis, range(len(result.layouts)), {k: [f.step_split_s[k] for f in result.layouts] for k in kinds})
    _label_axis(axis, result, "parts of a step", "s of the median step")


def _plot_memory(axis: Any, result: BenchResult) -> None:
    count = range(len(result.layouts))
    axis.bar([x - 0.2 for x in count], [max(f.static_bytes) / MIB for f in result.layouts], 0.4, label="held")
    axis.bar([x + 0.2 for x in count], [max(f.peak_bytes) / MIB for f in result.layouts], 0.4, label="peak")
    _label_axis(axis, result, "memory of the largest rank", "MiB")
    axis.legend()


def _plot_traffic(axis: Any, result: BenchResult) -> None:
    dims = sorted({dim for f in result.layouts for dim in f.received_bytes_per_step} - {"control"})
    heights = {f"over {dim}": [f.received_bytes_per_step.get(dim, 0) / MIB for f in result.layouts] for dim in dims} | {
        f"pages of the {owner}": [f.paged_bytes_per_step[owner] / MIB for f in result.layouts]
        for owner in ("base", "optimizer")
    }
    stack_bars(axis, range(len(result.layouts)), {label: values for label, values in heights.items() if any(values)})
    _label_axis(axis, result, "moved by rank 0", "MiB a step")


_PANELS: dict[str, Callable[..., None]] = {
    "throughput": _plot_throughput,
    "scaling": _plot_scaling,
    "split": _plot_step_split,
    "memory": _plot_memory,
    "traffic": _plot_traffic,
}


def _label_axis(axis: Any, result: BenchResult, title: str, unit: str) -> None:
    axis.set(title=title, ylabel=unit)
    axis.set_xticks(range(len(result.layouts)), [name.replace(", ", "\n") for name in layout_labels(result)])
    axis.grid(alpha=0.3, axis="y")
