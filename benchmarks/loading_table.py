"""The tables of loading.py, in Markdown."""

from __future__ import annotations

import statistics
from typing import Any

MIB = 2**20
SPARE_BYTES = 64 * MIB


def render_loading_tables(tree: dict[str, Any]) -> str:
    """What was loaded, a line for each loader and number of ranks, and whether ours keeps to its limit."""
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
    lines += [row(cells(group, total, tree["cold"])) for group in groups]
    lines += ["", *summary_lines(tree, [group for group in groups if group[0]["loader"] != "from_pretrained"])]
    return "\n".join(lines)


def cells(runs: list[dict[str, Any]], total: int, cold: bool) -> list[str]:
    """Medians over the repeats; of the ranks the slowest and largest counts."""
    seconds = [largest_mib(run, "seconds") for run in runs]
    read = statistics.median(largest_mib(run, "read_bytes") for run in runs) / total
    disk = statistics.median(sum(rank["disk_bytes"] for rank in run["ranks"]) for run in runs) / total
    mapped = runs[0]["loader"] == "from_pretrained"
    values = [str(runs[0]["number"]), runs[0]["loader"], f"{statistics.median(seconds):.2f}"]
    values += [f"{min(seconds):.2f} - {max(seconds):.2f}", f"{read:.4f}" + ", mapped" * mapped]
    values += [f"{disk:.4f}"] * cold
    held = [sum(rank["in_all_bytes"] for rank in run["ranks"]) for run in runs]
    beyond = [sum(rank["peak_bytes"] - rank["held_bytes"] for rank in run["ranks"]) for run in runs]
    memory = [[largest_mib(run, "peak_bytes") for run in runs], [sum(pair) for pair in zip(held, beyond, strict=True)]]
    memory += [[largest_mib(run, "held_bytes") for run in runs], held]
    return values + [f"{statistics.median(nbytes) / MIB:,.0f}" for nbytes in memory]


def summary_lines(tree: dict[str, Any], ours: list[list[dict[str, Any]]]) -> list[str]:
    """Of the limit, the waiting, and what was left out."""
    runs = [run for group in ours for run in group]
    spare = tree["largest_tensor_bytes"] + SPARE_BYTES
    found = []
    if runs:
        beyond = max(rank["peak_bytes"] - rank["static_bytes"] for run in runs for rank in run["ranks"])
        waiting = [largest_mib(run, "waiting_s") / largest_mib(run, "seconds") for run in runs]
        found.append(
            f"A rank of ours had at most {beyond / MIB:,.0f} MiB more than its tensors. The limit, the largest "
            f"tensor of all and 64 MiB, is {spare / MIB:,.0f} MiB: {'kept' if beyond <= spare else '**not kept**'}. "
            f"It waited for reads {100 * min(waiting):.0f} to {100 * max(waiting):.0f} % of the time."
        )
    return found + [f"Left out: {name}: {why}." for name, why in tree["left_out"].items()]


def largest_mib(run: dict[str, Any], key: str) -> float:
    return max(rank[key] for rank in run["ranks"])


def row(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"
