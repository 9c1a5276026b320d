"""The figures of a comparison as a table."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from qlora_dist.bench.bench_layouts import layout_label
from qlora_dist.bench.bench_result import BenchResult, LayoutResult, SkippedLayout, Spread

MIB = 2**20
_WIDEST = 1000
STEP_SPLIT_NOTE = "The parts of a step are from a step under the profiler, which is not timed."


def bench_table_rows(result: BenchResult) -> list[tuple[str, list[str]]]:
    """Return the rows of the table: a label, and a text for each layout."""
    kinds = list(result.layouts[0].step_shares)
    dims = sorted({dim for figures in result.layouts for dim in figures.received_bytes_per_step} - {"control"})
    lines: list[tuple[str, Callable[[LayoutResult], str]]] = [
        ("tokens/s, median", lambda f: _number(f.tokens_per_s.median)),
        ("  least - most", lambda f: _range(f.tokens_per_s)),
        ("trained tokens/s", lambda f: f"{f.trained_tokens_per_s.median:,.0f}"),
        ("with padding, tokens/s", lambda f: f"{f.positions_per_s.median:,.0f}"),
        ("seconds a step, median", lambda f: _number(f.step_s.median)),
        ("  least - most", lambda f: _range(f.step_s)),
        *((f"  {kind}, % of a step", lambda f, kind=kind: f"{100 * f.step_shares[kind]:.1f}") for kind in kinds),
        ("held by a rank, MiB", lambda f: f"{max(f.static_bytes) / MIB:,.2f}"),
        ("peak of a rank, MiB", lambda f: f"{max(f.peak_bytes) / MIB:,.0f}"),
        *(
            (f"received over {dim}, MiB a step", lambda f, dim=dim: _mib(f.received_bytes_per_step.get(dim, 0)))
            for dim in dims
        ),
        ("paged of the base, MiB a step", lambda f: _mib(f.paged_bytes_per_step["base"])),
        ("paged of the optimizer, MiB", lambda f: _mib(f.paged_bytes_per_step["optimizer"])),
        *([("nodes", lambda f: ", ".join(dict.fromkeys(f.nodes)))] if any(f.nodes for f in result.layouts) else []),
        ("loading, s", lambda f: f"{f.load_s.median:.2f}"),
        ("read by all ranks, MiB", lambda f: _mib(sum(f.read_bytes))),
        ("loss, last step", lambda f: f"{f.losses[-1]:.6f}"),
        ("  off the reference, any step", lambda f: f"{f.loss_difference_of_steps:.1e}"),
        ("  off the reference, mean", lambda f: f"{f.loss_difference_of_mean:.1e}"),
    ]
    return [(label, [text(figures) for figures in result.layouts]) for label, text in lines]


def layout_labels(result: BenchResult) -> list[str]:
    return [f"{f.layout}, {f.ranks} {'rank' if f.ranks == 1 else 'ranks'}" for f in result.layouts]


def print_bench_table(result: BenchResult, console: Console) -> None:
    """Print the table and its notes."""
    table = Table(box=None, header_style="bold")
    table.add_column("", no_wrap=True)
    for column in layout_labels(result):
        table.add_column(column.replace(", ", "\n"), justify="right")
    for label, texts in bench_table_rows(result):
        table.add_row(label, *texts)
    if console.is_terminal:
        console.print(table)
    else:  # a file can have lines of any length
        width = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
        Console(file=console.file, width=width, highlight=False).print(table)
    for skipped in result.left_out:
        console.print(skipped_layout_message(skipped), markup=False, soft_wrap=True)
    console.print(loss_comparison_message(result), markup=False, soft_wrap=True)
    console.print(STEP_SPLIT_NOTE, soft_wrap=True)


def bench_markdown(result: BenchResult) -> str:
    """Return the table and its notes in Markdown, followed by the command."""
    lines = [["", *layout_labels(result)], ["---", *["---:"] * len(result.layouts)]]
    lines += [[label.strip(), *texts] for label, texts in bench_table_rows(result)]
    notes = [*map(skipped_layout_message, result.left_out), loss_comparison_message(result), STEP_SPLIT_NOTE]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return table + "\n\n" + "\n".join(notes) + f"\n\n`{result.command}`\n"


def skipped_layout_message(skipped: SkippedLayout) -> str:
    """Return a sentence about a layout that is left out."""
    return f"left out: {layout_label(skipped.layout, skipped.ranks)}: {skipped.reason}"


def loss_comparison_message(result: BenchResult) -> str:
    """Return a sentence about whether the losses agree."""
    losses = result.losses
    difference = f"{losses.largest_difference:.1e} relative to {losses.reference}, {losses.tolerance:.0e} allowed"
    compared = "of each step" if losses.by == "step" else "of all trained tokens together"
    if losses.agree:
        return f"The losses of all layouts, {compared}, are within {difference}."
    worst = max(result.layouts, key=lambda f: f.loss_difference(losses.by))
    return f"The losses do not agree: {layout_label(worst.layout, worst.ranks)} differs by {difference}."


def _range(spread: Spread) -> str:
    return f"{_number(spread.least)} - {_number(spread.most)}"


def _number(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _mib(nbytes: float) -> str:
    return f"{nbytes / MIB:,.2f}" if nbytes else "-"
