"""A comparison as charts in PNG files, and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qlora_dist.bench.bench_result import BenchResult, Spread
from qlora_dist.bench.bench_table import (
    STEP_SPLIT_NOTE,
    bench_table_rows,
    layout_labels,
    loss_comparison_message,
    skipped_layout_message,
)
from qlora_dist.config.config_file import flatten_keys
from qlora_dist.report.panels import MATPLOTLIB_SETTINGS, draw_panels, panels_to_svg, stack_bars
from qlora_dist.report.write_report import render_html

_MIB = 2**20


def save_bench_plots(result: BenchResult, folder: Path) -> list[Path]:
    """Write each chart to a PNG file, and return the files."""
    import matplotlib

    files = []
    with matplotlib.rc_context(MATPLOTLIB_SETTINGS):
        for name, panel in _PANELS.items():
            files.append(folder / f"{name}.png")
            draw_panels([partial(panel, result=result)], 6.5, 4, columns=1).savefig(files[-1], dpi=150)
    return files


def render_bench_page(result: BenchResult) -> str:
    """Return the text of the page."""
    machine = result.machine
    links = (f"{name} {speed / 2**20:,.0f} MiB/s" for name, speed in machine.links_bytes_per_s.items())
    facts = {
        "date": machine.date,
        "device": machine.device,
        "processor": f"{machine.processor}, {machine.cores} cores, {machine.memory_bytes / 2**30:,.0f} GiB of memory",
        "busy before the first run": f"load average {machine.load_average:.1f}",
        "links": ", ".join(links) or "not measured",
        "system": machine.system,
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "threads of a rank": ", ".join(str(figures.threads_per_rank) for figures in result.layouts),
        "repeats, timed steps": ", ".join(f"{f.repeats}, {f.timed_steps}" for f in result.layouts),
    }
    changes = [
        (name, ", ".join(f"{key}={value}" for key, value in figures.overrides.items()))
        for name, figures in zip(layout_labels(result), result.layouts, strict=True)
    ]
    return render_html(
        "qlora_dist.bench",
        "bench.html.jinja",
        title=f"bench {result.config['model']['base']}",
        command=result.command,
        columns=layout_labels(result),
        rows=bench_table_rows(result),
        notes=[*map(skipped_layout_message, result.left_out), loss_comparison_message(result), STEP_SPLIT_NOTE],
        charts=panels_to_svg([partial(panel, result=result) for panel in _PANELS.values()], 10 / 3),
        facts=facts,
        changes=changes,
        config=flatten_keys(result.config),
    )


def _plot_throughput(axis: Any, result: BenchResult) -> None:
    medians, yerr = _error_bars([figures.tokens_per_s for figures in result.layouts])
    axis.bar(range(len(medians)), medians, yerr=yerr, capsize=3)
    _label_axis(axis, result, "throughput: median, least and most", "tokens/s, all ranks")


def _plot_scaling(axis: Any, result: BenchResult) -> None:
    for layout in dict.fromkeys(figures.layout for figures in result.layouts):
        figures = [f for f in result.layouts if f.layout == layout]
        medians, yerr = _error_bars([f.tokens_per_s for f in figures])
        x = [f.ranks for f in figures]
        axis.errorbar(x, medians, yerr=yerr, marker="o", markersize=4, capsize=3, label=layout)
    axis.set(title="throughput against ranks", xlabel="ranks", ylabel="tokens/s, all ranks", ylim=(0, None))
    axis.set_xticks(sorted({figures.ranks for figures in result.layouts}))
    axis.grid(alpha=0.3)
    axis.legend()


def _error_bars(spreads: Sequence[Spread]) -> tuple[list[float], list[list[float]]]:
    """Return the medians, and the distances below and above them."""
    medians = [spread.median for spread in spreads]
    return medians, [[s.median - s.least for s in spreads], [s.most - s.median for s in spreads]]


def _plot_step_split(axis: Any, result: BenchResult) -> None:
    kinds = result.layouts[0].step_split_s
    stack_bars(axis, range(len(result.layouts)), {k: [f.step_split_s[k] for f in result.layouts] for k in kinds})
    _label_axis(axis, result, "parts of a step", "s of the median step")


def _plot_memory(axis: Any, result: BenchResult) -> None:
    count = range(len(result.layouts))
    axis.bar([x - 0.2 for x in count], [max(f.static_bytes) / _MIB for f in result.layouts], 0.4, label="held")
    axis.bar([x + 0.2 for x in count], [max(f.peak_bytes) / _MIB for f in result.layouts], 0.4, label="peak")
    _label_axis(axis, result, "memory of the largest rank", "MiB")
    axis.legend()


def _plot_traffic(axis: Any, result: BenchResult) -> None:
    dims = sorted({dim for f in result.layouts for dim in f.received_bytes_per_step} - {"control"})
    heights = {
        f"over {dim}": [f.received_bytes_per_step.get(dim, 0) / _MIB for f in result.layouts] for dim in dims
    } | {
        f"pages of the {owner}": [f.paged_bytes_per_step[owner] / _MIB for f in result.layouts]
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
