"""Findings of `qlora-dist doctor`, one per check."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

FindingStatus = Literal["ok", "warn", "fail"]
_SEVERITY: dict[FindingStatus, int] = {"ok": 0, "warn": 1, "fail": 2}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result of one check."""

    check: str = field(kw_only=False)
    status: FindingStatus = field(kw_only=False)
    said: str
    remedy: str = ""
    """Remedy for the user; empty if the status is ok."""
    values: dict[str, Any] | None = None
    """Measured values for `--json`, in bytes, seconds or bytes per second."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def worst_finding(findings: list[Finding]) -> Finding:
    """Return the first finding with the worst status."""
    return max(findings, key=lambda finding: _SEVERITY[finding.status])


def merge_findings(by_node: dict[str, list[Finding]]) -> list[Finding]:
    """Merge equal findings of nodes, whose checks are in one order, and add the nodes' names where they differ."""
    result: list[Finding] = []
    for findings in zip(*by_node.values(), strict=True):
        groups: dict[tuple[str, str], list[str]] = {}
        for node, finding in zip(by_node, findings, strict=True):
            # nodes with status ok differ only in figures, which would fill a screen for a hundred nodes
            groups.setdefault((finding.status, finding.said if finding.status != "ok" else ""), []).append(node)
        for nodes in groups.values():
            first = findings[list(by_node).index(nodes[0])]
            message = first.said
            if len(groups) > 1 and first.status != "ok":
                names = nodes if len(nodes) < 5 else nodes[:3]
                more = f" and {len(nodes) - 3} more" if len(nodes) > 4 else ""
                message = f"{', '.join(names)}{more}: {message}"
            elif any(finding.said != message for finding in findings if finding.status == "ok"):
                others = f"; {len(nodes) - 1} more fine" if len(nodes) > 1 else ""
                message = f"{nodes[0]}: {message}{others}"
            result.append(replace(first, said=message))
    return result
