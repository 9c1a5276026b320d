"""Test of a job's nodes before its ranks start: `python -m qlora_dist.launch.preflight`, one process on each node.

It finds missing nodes and slow ones. Each node exchanges some MB with its left and then with its right neighbour. A
slow node is slow with both, and its neighbours are not.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import read_rank_info

if TYPE_CHECKING:
    import torch

PREFLIGHT_TIMEOUT_S = 120.0
"""Seconds until all nodes must have joined, and time limit of each exchange."""
SLOW_FACTOR = 4.0
"""Factor of the median time above which a node counts as slow."""
_PAYLOAD_MIB = 16
_EXCHANGE_REPEATS = 3


def find_slow_nodes(times: Sequence[tuple[float, float]]) -> list[int]:
    """Return the nodes that are slow with both neighbours, from the seconds of each node's exchanges with them."""
    best = [min(pair) for pair in times]
    return [node for node, seconds in enumerate(best) if seconds > SLOW_FACTOR * median(best)]


def run_preflight() -> None:
    """Join all nodes, exchange data, and print which nodes are slow."""
    import torch
    import torch.distributed as dist

    from qlora_dist.runtime.object_collectives import all_gather_json
    from qlora_dist.runtime.process_group import process_group

    ranks = read_rank_info()
    host = socket.gethostname()
    started = time.monotonic()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with process_group(ranks, device, PREFLIGHT_TIMEOUT_S):
        joined_s = time.monotonic() - started
        data = torch.ones(_PAYLOAD_MIB << 18, device=device)
        dist.all_reduce(data)  # opens the connections
        pair = [_time_exchange(data, ranks.rank, ranks.world_size, shift) for shift in (0, 1)]
        answers = all_gather_json([host, joined_s, *pair])
    if ranks.rank != 0:
        return
    hosts, times = [answer[0] for answer in answers], [(answer[2], answer[3]) for answer in answers]
    rate = _PAYLOAD_MIB * 2**20 * 8 / median(min(pair) for pair in times) / 1e9
    print(f"preflight: {len(hosts)} nodes joined after {max(a[1] for a in answers):.1f} s, {rate:.1f} Gbit/s")
    for node in find_slow_nodes(times):
        print(f"preflight: {hosts[node]} is slow: {_PAYLOAD_MIB * 2**20 * 8 / min(times[node]) / 1e9:.2f} Gbit/s")


def _time_exchange(data: torch.Tensor, rank: int, world_size: int, shift: int) -> float:
    """Return the seconds to swap `data` with a neighbour in a ring.

    The pairs are (0, 1), (2, 3)... or, with `shift` 1, (1, 2), (3, 4)...
    """
    import torch
    import torch.distributed as dist

    partner = rank + (1 if (rank + shift) % 2 == 0 else -1)
    if shift and world_size % 2 == 0:
        partner %= world_size
    received = torch.empty_like(data)
    best = float("inf")
    for _ in range(_EXCHANGE_REPEATS):
        dist.barrier()
        if not 0 <= partner < world_size:
            continue
        start = time.perf_counter()
        work = [dist.P2POp(dist.isend, data, partner), dist.P2POp(dist.irecv, received, partner)]
        for request in dist.batch_isend_irecv(work):
            request.wait()
        if data.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def add_node_names(message: str, nodes: Sequence[str]) -> str:
    """Add the node's name to each rank in a message. Each node has one rank here."""
    return re.sub(r"rank (\d+)", lambda match: f"{match[0]} ({nodes[int(match[1])]})", message)


def _job_nodes() -> list[str]:
    command = ["scontrol", "show", "hostnames"]  # without an argument it lists the job's nodes
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()


if __name__ == "__main__":
    try:
        run_preflight()
    except UserError as error:
        print(f"preflight: {add_node_names(str(error), _job_nodes())}", file=sys.stderr)
        sys.exit(1)  # not the exit code of a user's error, because restarting may succeed
