"""A comparison as one self-contained HTML page."""

from __future__ import annotations

from qlora_dist.bench.bench_result import BenchResult
from qlora_dist.bench.bench_table import (
    STEP_SPLIT_NOTE,
    bench_table_rows,
    layout_labels,
    loss_comparison_message,
    skipped_layout_message,
)
from qlora_dist.bench.plot_bench import draw_bench_svg
from qlora_dist.config.config_file import flatten_keys
from qlora_dist.report.html_page import render_html


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
        charts=draw_bench_svg(result),
        facts=facts,
        changes=changes,
        config=flatten_keys(result.config),
    )
