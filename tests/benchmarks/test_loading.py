"""If this fails, the comparison of loaders counts memory wrongly, or reports a broken limit as kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # after tests, whose modules have equal names

from loading_table import render_loading_tables  # type: ignore[import-not-found]

from qlora_dist.runtime.system import machine_info

MIB = 2**20


def rank(seconds: float, read: int, peak: int, held: int, in_all: int) -> dict[str, Any]:
    memory = {"peak_bytes": peak * MIB, "held_bytes": held * MIB, "in_all_bytes": in_all * MIB}
    return memory | {
        "seconds": seconds,
        "waiting_s": 0.0,
        "read_bytes": read * MIB,
        "disk_bytes": 0,
        "static_bytes": held * MIB,
    }


def tree(peak: int) -> dict[str, Any]:
    """Return figures of two ranks that load 100 MiB; transformers' ranks share mapped pages."""
    ours = [{"ranks": [rank(s, 50, peak, 50, 50), rank(1, 50, 60, 50, 50)]} for s in (2, 4)]
    theirs = {"ranks": [rank(1, 100, 100, 100, 50)] * 2}
    return {
        "layers": 1,
        "folder_bytes": 100 * MIB,
        "largest_tensor_bytes": 20 * MIB,
        "cold": False,
        "repeats": 2,
        "machine": machine_info("cpu"),
        "runs": [run | {"loader": "ours", "number": 2} for run in ours]
        + [theirs | {"loader": "from_pretrained", "number": 2}],
        "left_out": {"from_pretrained, 4": "too large"},
    }


def test_the_slowest_rank_counts_and_shared_pages_count_once() -> None:
    text = render_loading_tables(tree(90))
    assert "| 2 | ours | 3.00 | 2.00 - 4.00 | 0.5000 | 90 | 150 | 50 | 100 |" in text
    assert "| 2 | from_pretrained | 1.00 | 1.00 - 1.00 | 1.0000, mapped | 100 | 100 | 100 | 100 |" in text
    assert "Left out: from_pretrained, 4: too large." in text


def test_the_limit_is_the_largest_tensor_and_a_constant() -> None:
    assert "is 84 MiB: kept" in render_loading_tables(tree(50 + 84))
    assert "is 84 MiB: **not kept**" in render_loading_tables(tree(50 + 85))
