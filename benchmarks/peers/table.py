"""The tables in Markdown: figures, the outcome of each peer, and each claim as a ratio."""

from __future__ import annotations

import re
from typing import Any

from figures import claims
from systems import SYSTEMS

CLAIM_LABELS = {
    "full": "full",
    "uneven": "uneven",
    "static_bytes": "static",
    "load_peak_bytes": "at load",
    "train_peak_bytes": "in training",
    "wire_bytes": "wire",
    "losses": "losses differ by",
}


def render_tables(tree: dict[str, Any]) -> str:
    """Return all tables."""
    done = [line for line in tree["systems"] if line["repeats"]]
    peers = [line for line in tree["systems"] if not line["system"].startswith("ours")]
    tables = [conditions(tree["settings"], tree["runs"]), figures_table(done)]
    if peers:
        tables.append(markdown_table(["system", "ranks", "outcome"], [figure_cells(line) for line in peers]))
    ratios = claims_table(claims(tree["systems"]), {line["system"]: system_label(line) for line in done})
    return "\n\n".join(tables + ([ratios] if ratios else []))


def conditions(settings: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    machine = settings["machine"]
    versions = [f"{name} {machine['versions'][name]}" for name in ("qlora-dist", "torch", "transformers")]
    minutes = sum(run["seconds"] for run in runs) / 60
    return (
        f"{settings['base']}: {settings['rows']} rows of {settings['seq_len']} tokens a step, "
        f"{settings['steps']} timed of each kind in each of {settings['repeats']} repeats, {minutes:.0f} minutes; "
        f"{settings['threads']} threads, {machine['cores']} cores of {machine['processor']}, "
        f"load {machine['load_average']:.1f} before; {', '.join(versions)}."
    )


def figures_table(lines: list[dict[str, Any]]) -> str:
    """Return the table of medians, with ranges in brackets."""
    heads = ["system", "ranks", "full, tokens/s", "uneven, tokens/s", "static MB", "peak at load MB"]
    heads += ["peak in training MB", "wire MB a step", "losses"]
    rows = []
    for line in lines:
        cells = [system_label(line), str(line["ranks"])]
        for kind in ("full", "uneven"):
            low, high = line[f"{kind}_range"]
            style = ".0f" if low >= 10 else ".1f"
            cells.append(f"{line[f'{kind}_tokens_per_s']:{style}} ({low:{style}} - {high:{style}})")
        sizes = ("static_bytes", "load_peak_bytes", "train_peak_bytes", "wire_bytes")
        cells += ["-" if line[key] is None else f"{line[key] / 1e6:.1f}" for key in sizes]
        rows.append([*cells, ", ".join(f"{loss:.4f}" for loss in line["losses"])])
    return markdown_table(heads, rows)


def figure_cells(line: dict[str, Any]) -> list[str]:
    """Return a peer with its versions, its number of ranks, and its outcome or error."""
    system = SYSTEMS[line["system"]]
    name = f"{line['system']}: {', '.join(system.versions())}"
    if line["error"]:
        outcome = f"`{exception_line(line['error'])}`".replace("|", "\\|")
    elif is_plugin_ignored(line):
        outcome = "ran as plain data parallelism (`DistributedDataParallel`): the plugin is silently ignored"
    else:
        outcome = f"ran (`{line['engine']}`)"
    return [name, str(line["ranks"]), outcome + (f"; {system.note}" if system.note and not line["error"] else "")]


def claims_table(results: list[dict[str, Any]], names: dict[str, str]) -> str:
    """Return the table of ratios of our figures to each peer's, with ranges of speeds.

    Losses have the largest relative difference instead. **no** marks a claim that does not hold.
    """
    if not results:
        return ""
    limits = {key: next((c["limit"] for c in results if c["what"] == key), "") for key in CLAIM_LABELS}
    heads = ["against", "ranks", "ours", *(f"{name} {limits[key]}".strip() for key, name in CLAIM_LABELS.items())]
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for claim in results:
        style = ".1e" if claim["what"] == "losses" else ".2f" if "range" in claim else ".3f"
        ratio = f"{claim['ratio']:{style}}"
        if "range" in claim:
            ratio += " ({:.2f} - {:.2f})".format(*claim["range"])
        key = names[claim["peer"]], str(claim["ranks"]), claim["ours"]
        rows.setdefault(key, {})[claim["what"]] = ratio + ("" if claim["holds"] else " **no**")
    return markdown_table(
        heads, [[*key, *(cells.get(name, "-") for name in CLAIM_LABELS)] for key, cells in rows.items()]
    )


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def exception_line(error: str) -> str:
    """Return the last line with an exception and the lines after it, but not the error of a rank that lost a peer."""
    lines = [re.sub(r"^\[rank\d+\]: ", "", line) for line in error.strip().splitlines()]
    named = [
        index
        for index, line in enumerate(lines)
        if re.match(r"[\w.]*(Error|Exception|Exit)\b(?!.*closed by peer)", line)
    ]
    return " ".join(lines[named[-1] :][:4]) if named else lines[-1]


def is_plugin_ignored(line: dict[str, Any]) -> bool:
    return line["system"].startswith("accelerate FSDP") and line["engine"] == "DistributedDataParallel"


def system_label(line: dict[str, Any]) -> str:
    """Return a system's label, which says if it ran something else than configured."""
    return f"{line['system']}: ran DDP" if is_plugin_ignored(line) else line["system"]
