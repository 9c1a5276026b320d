"""One line of what the doctor says."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

FindingStatus = Literal["ok", "warn", "fail"]
_SEVERITY: dict[FindingStatus, int] = {"ok": 0, "warn": 1, "fail": 2}


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    status: FindingStatus
    said: str
    remedy: str = ""
    """What the user can do; empty if it is ok."""
    values: dict[str, Any] | None = None
    """What was measured, for `--json`: bytes, seconds, bytes per second."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`, and for the other ranks."""
        return asdict(self)


def worst_finding(findings: list[Finding]) -> Finding:
    """The first of the worst status."""
    return max(findings, key=lambda finding: _SEVERITY[finding.status])


def merge_findings(by_node: dict[str, list[Finding]]) -> list[Finding]:
    """What all nodes have found: each line once, with the nodes' names where they differ.

    Args:
        by_node: each node's findings, the same checks in the same order.
    """
    result: list[Finding] = []
    for findings in zip(*by_node.values(), strict=True):
        groups: dict[tuple[str, str], list[str]] = {}
        for node, finding in zip(by_node, findings, strict=True):
            # a node that is fine has a figure of its own, which nobody wants to see of a hundred
            groups.setdefault((finding.status, finding.said if finding.status != "ok" else ""), []).append(node)
        for nodes in groups.values():
            first = findings[list(by_node).index(nodes[0])]
            message = first.said
            if len(groups) > 1 and first.status != "ok":
                message = f"{_names(nodes)}: {message}"
            elif any(finding.said != message for finding in findings if finding.status == "ok"):
                others = f"; {len(nodes) - 1} more fine" if len(nodes) > 1 else ""
                message = f"{nodes[0]}: {message}{others}"
            result.append(replace(first, said=message))
    return result


def _names(nodes: list[str]) -> str:
    return ", ".join(nodes) if len(nodes) < 5 else f"{', '.join(nodes[:3])} and {len(nodes) - 3} more"
