"""Command `qlora-dist doctor`: check this machine or, on the ranks of a job, all machines and their connections."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qlora_dist.doctor.cross_node_checks import (
    check_bandwidth,
    check_clocks,
    check_peer_host_names,
    check_peer_ports,
    check_shared_run_folder,
)
from qlora_dist.doctor.finding import Finding, merge_findings, worst_finding
from qlora_dist.doctor.node_checks import check_node
from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import RankInfo, read_rank_info
from qlora_dist.runtime.object_collectives import all_gather_json
from qlora_dist.runtime.process_group import process_group, resolve_device

_STATUS_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def run_doctor(folder: Path, device: str = "auto", timeout_s: float = 60.0, *, as_json: bool = False) -> bool:
    """Run all checks and print the findings on rank 0.

    Args:
        folder: folder of all runs.
        device: `auto`, `cpu` or `cuda`.
        timeout_s: seconds to wait for the other ranks.
        as_json: True to print JSON instead of a table.

    Returns:
        Whether no check failed. Warnings do not count as failures.

    Raises:
        UserError: a rank did not join.
    """
    ranks = read_rank_info()
    try:
        chosen = resolve_device(device, ranks)
    except UserError:
        if device == "cuda":
            raise
        chosen = torch.device("cpu")  # too few GPUs; `check_devices` reports them, and the other checks still run
    findings = check_node(ranks, chosen, folder)
    if ranks.world_size > 1:
        with process_group(ranks, chosen, timeout_s):
            findings = _job_findings(findings, ranks, chosen, folder)
    if ranks.rank == 0:
        _print(findings, ranks, as_json=as_json)
    return all(finding.status != "fail" for finding in findings)


def _job_findings(own: list[Finding], ranks: RankInfo, device: torch.device, folder: Path) -> list[Finding]:
    by_rank = all_gather_json([socket.gethostname(), [finding.to_json() for finding in own]])
    local = ranks.local_world_size
    nodes = [name for name, _ in by_rank[::local]]
    # nodes emulated on one machine may share its name
    names = [name if nodes.count(name) == 1 else f"{name} (node {index})" for index, name in enumerate(nodes)]
    by_node = {}
    for index, name in enumerate(names):
        rank_findings = [[Finding(**found) for found in findings] for _, findings in by_rank[index * local :][:local]]
        by_node[name] = [worst_finding(list(findings)) for findings in zip(*rank_findings, strict=True)]
    return [
        *merge_findings(by_node),
        check_peer_host_names(nodes, ranks),
        check_peer_ports(nodes, ranks),
        check_shared_run_folder(names, ranks, folder),
        check_clocks(names, ranks),
        *check_bandwidth(ranks, device),
    ]


def _print(findings: list[Finding], ranks: RankInfo, *, as_json: bool) -> None:
    status = next((status for status in ("fail", "warn") if any(f.status == status for f in findings)), "ok")
    if as_json:
        tree = {
            "status": status,
            "ranks": ranks.world_size,
            "nodes": ranks.world_size // ranks.local_world_size,
            "findings": [finding.to_json() for finding in findings],
        }
        print(json.dumps(tree, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        style = _STATUS_STYLES[finding.status]
        table.add_row(f"[{style}]{finding.status}[/]", finding.check, escape(finding.said))
        if finding.remedy:
            table.add_row("", "", f"[dim]{escape(finding.remedy)}[/]")
    Console().print(table)
