"""The tables."""

from __future__ import annotations

import re
from typing import Any

from figures import claims
from rich.console import Console
from rich.table import Table

NAMES = {
    "full_tokens_per_s": "tokens/s, same batch shape",
    "uneven_tokens_per_s": "tokens/s, uneven lengths",
    "static_bytes": "static bytes",
    "load_peak_bytes": "peak at load",
    "wire_bytes": "bytes on the wire",
    "losses": "losses differ by",
}


def show(tree: dict[str, Any], console: Console | None = None) -> None:
    """Figures of each system, errors, and each claim with its number."""
    console = console or Console(width=150, highlight=False)
    settings = tree["settings"]
    heads = ("full, tokens/s", "min-max", "uneven, tokens/s", "min-max", "static MB", "peak at load MB")
    table = Table(
        title=f"{settings['base']}: {settings['rows']} rows of {settings['seq_len']} tokens a step",
        title_justify="left",
    )
    for head in ("system", "ranks", *heads, "peak in training MB", "wire MB a step", "first loss"):
        table.add_column(head, justify="left" if head == "system" else "right", no_wrap=head == "system")
    for line in tree["systems"]:
        if not line["repeats"]:
            table.add_row(line["system"], str(line["ranks"]), "-")
            continue
        cells = []
        for kind in ("full", "uneven"):
            low, high = line[f"{kind}_range"]
            cells += [f"{line[f'{kind}_tokens_per_s']:.0f}", f"{low:.0f}-{high:.0f}"]
        sizes = ("static_bytes", "load_peak_bytes", "train_peak_bytes", "wire_bytes")
        cells += ["" if line[key] is None else f"{line[key] / 1e6:.1f}" for key in sizes]
        table.add_row(called(line), str(line["ranks"]), *cells, f"{line['losses'][0]:.4f}")
    console.print(table)
    for line in tree["systems"]:
        if line["error"]:
            console.print(f"{line['system']}, {line['ranks']} ranks: {reason(line['error'])}", markup=False)
    found = claims(tree["systems"])
    verdicts = Table(title="claims", title_justify="left")
    for head in ("peer", "ranks", "ours", "what", "ratio", "should be", "holds"):
        verdicts.add_column(head, justify="right" if head in ("ranks", "ratio") else "left")
    for claim in found:
        ratio = f"{claim['ratio']:.1e}" if claim["what"] == "losses" else f"{claim['ratio']:.2f}"
        cells = [str(claim[key]) for key in ("peer", "ranks", "ours")]
        verdicts.add_row(*cells, NAMES[claim["what"]], ratio, claim["limit"], "yes" if claim["holds"] else "NO")
    console.print(verdicts)


def reason(error: str) -> str:
    """The last line that names an exception, and what belongs to it; not that of a rank that has lost another."""
    lines = [re.sub(r"^\[rank\d+\]: ", "", line) for line in error.strip().splitlines()]
    named = [
        index
        for index, line in enumerate(lines)
        if re.match(r"[\w.]*(Error|Exception|Exit)\b(?!.*closed by peer)", line)
    ]
    return " ".join(lines[named[-1] :][:4]) if named else lines[-1]


def called(line: dict[str, Any]) -> str:
    """A system that has run something else than it was asked for says so."""
    ignored = line["system"].startswith("accelerate FSDP") and line["engine"] == "DistributedDataParallel"
    return f"{line['system']}: ran DDP" if ignored else line["system"]
