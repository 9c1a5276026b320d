"""Figures from the marks of the runs: medians over steps and repeats."""

from __future__ import annotations

import statistics
from typing import Any

from systems import SYSTEMS


def figures(runs: list[dict[str, Any]], steps: list[dict[str, Any]], timed: int) -> list[dict[str, Any]]:
    """Return the figures of each system on each number of ranks, in the order of the runs.

    Args:
        runs: runs of all systems.
        steps: steps of the material, full ones first, then uneven ones.
        timed: number of timed steps of each kind.
    """
    keys = list(dict.fromkeys((run["system"], run["ranks"]) for run in runs))
    lines = []
    for system, ranks in keys:
        repeats = [run for run in runs if (run["system"], run["ranks"]) == (system, ranks)]
        done = [summarize_run_marks(run, steps, timed) for run in repeats if not run["error"]]
        line: dict[str, Any] = {"system": system, "ranks": ranks, "repeats": len(done)}
        line["error"] = next((run["error"] for run in repeats if run["error"]), None)
        if done:
            for kind in ("full", "uneven"):
                rates = [rate for figures_of_run in done for rate in figures_of_run[kind]]
                line[f"{kind}_rates"] = rates
                line[f"{kind}_tokens_per_s"] = statistics.median(rates)
                line[f"{kind}_range"] = [min(rates), max(rates)]
            for key in ("static_bytes", "load_peak_bytes", "train_peak_bytes", "wire_bytes", "load_s"):
                # the first run also compiles its imports, some of them during loading
                first = 1 if key in ("load_peak_bytes", "load_s") and len(done) > 1 else 0
                values = [value for figures_of_run in done[first:] if (value := figures_of_run[key]) is not None]
                line[key] = statistics.median(values) if values else None
            line |= {"losses": done[0]["losses"], "engine": done[0]["engine"]}
        lines.append(line)
    return lines


def summarize_run_marks(run: dict[str, Any], steps: list[dict[str, Any]], timed: int) -> dict[str, Any]:
    marks = run["marks"][0]
    begins, ends = ([mark for mark in marks if mark["what"] == what] for what in ("begin", "step"))
    tokens = "our_tokens" if run["system"].startswith("ours") else "tokens"
    rates: dict[str, list[float]] = {"full": [], "uneven": []}
    for index in range(1, len(steps)):
        if steps[index - 1]["kind"] == steps[index]["kind"]:  # the first of a kind is not timed
            seconds = ends[index]["time"] - begins[index]["time"]
            rates[steps[index]["kind"]].append(steps[index][tokens] / seconds)
    sent = (ends[timed]["sent"] - ends[0]["sent"]) / timed / run["ranks"] if run["namespace"] else None
    return rates | {
        "static_bytes": max(find_mark(rank, "end")["static_bytes"] for rank in run["marks"]),
        "load_peak_bytes": max(
            find_mark(r, "loaded")["VmHWM"] - find_mark(r, "imported")["VmRSS"] for r in run["marks"]
        ),
        "train_peak_bytes": max(find_mark(rank, "end")["VmHWM"] for rank in run["marks"]),
        "wire_bytes": sent,
        "load_s": find_mark(marks, "loaded")["time"] - find_mark(marks, "imported")["time"],
        "losses": [mark["loss"] for mark in marks if mark["what"] == "loss"][: timed + 1],
        "engine": find_mark(marks, "engine")["engine"],
    }


def find_mark(marks: list[dict[str, Any]], what: str) -> dict[str, Any]:
    return next(mark for mark in marks if mark["what"] == what)


def claims(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all claims against each peer on the same number of ranks, and whether they hold.

    Comparable variants are compared. A peer that replicates the base is compared with the variant of ours that does so
    too, if it was run. A peer without recomputation is compared only with ours without it. A peer that recomputes is
    compared with both.
    """
    done = [line for line in lines if line["repeats"]]
    results = []
    for peer in (line for line in done if not line["system"].startswith("ours")):
        ours = [line for line in done if line["system"].startswith("ours") and line["ranks"] == peer["ranks"]]
        if not SYSTEMS[peer["system"]].recomputes:
            ours = [line for line in ours if not SYSTEMS[line["system"]].recomputes]
        is_replicated = peer["engine"] == "DistributedDataParallel"
        same_layout = [line for line in ours if (line["engine"] == "base: replicate") == is_replicated]
        results += [claim for line in same_layout or ours for claim in compare_with_peer(line, peer)]
    return results


def compare_with_peer(ours: dict[str, Any], peer: dict[str, Any]) -> list[dict[str, Any]]:
    names = {"ours": ours["system"], "peer": peer["system"], "ranks": peer["ranks"]}
    results = []
    for kind, least in (("full", 1.5), ("uneven", 2.0)):
        # pair steps of the same turn; a peer that failed in a later repeat has fewer steps
        pairs = zip(ours[f"{kind}_rates"], peer[f"{kind}_rates"], strict=False)
        ratios = [our_rate / peer_rate for our_rate, peer_rate in pairs]
        claim = {"what": kind, "ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
        results.append(names | claim | {"limit": f">= {least}", "holds": claim["ratio"] >= least})
    for key in ("static_bytes", "load_peak_bytes", "train_peak_bytes", "wire_bytes"):
        if ours[key] is not None and peer[key]:
            ratio = ours[key] / peer[key]
            results.append(names | {"what": key, "ratio": ratio, "limit": "<= 1", "holds": ratio <= 1})
    worst = max(abs(a / b - 1) for a, b in zip(ours["losses"], peer["losses"], strict=True))
    results.append(names | {"what": "losses", "ratio": worst, "limit": "<= 1e-2", "holds": worst <= 1e-2})
    return results
