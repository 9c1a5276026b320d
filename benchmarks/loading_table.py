"""The tables of loading.py, in Markdown."""

from __future__ import annotations

import statistics
from typing import Any

MIB = 2**20
SPARE_BYTES = 64 * MIB


def render_loading_tables(tree: dict[str, Any]) -> str:
    """Return the table with a row for each loader and number of ranks, and whether qlora-dist keeps to its limit."""
    keys = list(dict.fromkeys((run["number"], run["loader"]) for run in tree["runs"]))
    groups = [
        [run for run in tree["runs"] if (run["number"], run["loader"]) == key]
        for key in sorted(keys, key=lambda key: key[0])
    ]
    machine, total = tree["machine"], tree["folder_bytes"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "bitsandbytes"))
    source = "the disk" if tree["cold"] else "the page cache"
    lines = [
        f"{total / 1e9:.2f} GB in 4 bit, {tree['layers']} layers, read from {source}; repeats: {tree['repeats']}; "
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_bytes'] / 2**30:.0f} GiB of memory, "
        f"load {machine['load_average']:.1f}; {versions}.",
        "",
    ]
    heads = ["ranks", "loader", "seconds", "least - most", "read by a rank, of the folder"]
    heads += ["from the disk, all ranks"] * tree["cold"]
    heads += ["peak of a rank, MiB", "peak of all, MiB", "held by a rank, MiB", "held by all, MiB"]
    lines += [row(heads), row(["---:", "---"] + ["---:"] * (len(heads) - 2))]
    lines += [row(cells(group, total, cold=tree["cold"])) for group in groups]
    lines += ["", *summary_lines(tree, [group for group in groups if group[0]["loader"] != "from_pretrained"])]
    return "\n".join(lines)


def cells(runs: list[dict[str, Any]], total: int, *, cold: bool) -> list[str]:
    """Return a row's cells: medians over the repeats of the slowest or largest rank."""
    seconds = [largest(run, "seconds") for run in runs]
    read = statistics.median(largest(run, "read_bytes") for run in runs) / total
    disk = statistics.median(sum(rank["disk_bytes"] for rank in run["ranks"]) for run in runs) / total
    mapped = runs[0]["loader"] == "from_pretrained"
    values = [str(runs[0]["number"]), runs[0]["loader"], f"{statistics.median(seconds):.2f}"]
    values += [f"{min(seconds):.2f} - {max(seconds):.2f}", f"{read:.4f}" + ", mapped" * mapped]
    values += [f"{disk:.4f}"] * cold
    held = [sum(rank["in_all_bytes"] for rank in run["ranks"]) for run in runs]
    excess = [sum(rank["peak_bytes"] - rank["held_bytes"] for rank in run["ranks"]) for run in runs]
    memory = [[largest(run, "peak_bytes") for run in runs], [sum(pair) for pair in zip(held, excess, strict=True)]]
    memory += [[largest(run, "held_bytes") for run in runs], held]
    return values + [f"{statistics.median(nbytes) / MIB:,.0f}" for nbytes in memory]


def summary_lines(tree: dict[str, Any], ours: list[list[dict[str, Any]]]) -> list[str]:
    """Return sentences about the limit, the waiting, and loaders that are left out."""
    runs = [run for group in ours for run in group]
    limit = tree["largest_tensor_bytes"] + SPARE_BYTES
    lines = []
    if runs:
        excess = max(rank["peak_bytes"] - rank["static_bytes"] for run in runs for rank in run["ranks"])
        waiting = [largest(run, "waiting_s") / largest(run, "seconds") for run in runs]
        lines.append(
            f"A rank of ours had at most {excess / MIB:,.0f} MiB more than its tensors. The limit, the largest "
            f"tensor of all and 64 MiB, is {limit / MIB:,.0f} MiB: {'kept' if excess <= limit else '**not kept**'}. "
            f"It waited for reads {100 * min(waiting):.0f} to {100 * max(waiting):.0f} % of the time."
        )
    return lines + [f"Left out: {name}: {reason}." for name, reason in tree["left_out"].items()]


def largest(run: dict[str, Any], key: str) -> float:
    """Return the largest figure of a run's ranks."""
    return max(rank[key] for rank in run["ranks"])


def row(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"
