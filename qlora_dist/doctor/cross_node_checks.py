"""Checks between the nodes of a job. Call each function on all ranks; it returns the same finding on each."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qlora_dist.doctor.finding import Finding
from qlora_dist.doctor.node_checks import nearest_existing_folder
from qlora_dist.runtime.environment import RankInfo
from qlora_dist.runtime.object_collectives import all_gather_json
from qlora_dist.runtime.shared_folder import probe_shared_folder

_CONNECT_S = 5.0
_SKEW_S = 1.0
_TRIAL_BYTES = 2**20
_LARGEST_BYTES = 2**28
_TRANSFER_S = 0.4
_REPEATS = 5


def check_peer_host_names(nodes: list[str], ranks: RankInfo) -> Finding:
    """Check that every node resolves every other node's name. `nodes` are host names in the order of ranks."""
    unknown = []
    if ranks.local_rank == 0:
        for name in nodes:
            try:
                socket.getaddrinfo(name, None)
            except OSError:
                unknown.append(name)
    by_rank = all_gather_json([socket.gethostname(), unknown])
    bad = [f"{node} cannot resolve {', '.join(names)}" for node, names in by_rank if names]
    if bad:
        return Finding(
            "names", "fail", said="; ".join(bad), remedy="add them to the DNS, or to /etc/hosts of each node"
        )
    return Finding("names", "ok", said=f"the {len(nodes)} nodes resolve each other's names")


def check_peer_ports(nodes: list[str], ranks: RankInfo) -> Finding:
    """Check that every node reaches the next one at a port chosen by the system, as for the ranks' connections."""
    node = ranks.rank // ranks.local_world_size
    refused = ""
    with socket.socket() as listening:
        if ranks.local_rank == 0:
            listening.bind(("", 0))
            listening.listen()
        ports = all_gather_json(listening.getsockname()[1] if ranks.local_rank == 0 else 0)
        if ranks.local_rank == 0 and len(nodes) > 1:
            next_node = (node + 1) % len(nodes)
            host, port = nodes[next_node], ports[next_node * ranks.local_world_size]
            try:
                socket.create_connection((host, port), _CONNECT_S).close()
            except OSError as error:
                refused = f"{nodes[node]} does not reach {host}:{port} ({error.strerror or error})"
        bad = [text for text in all_gather_json(refused) if text]
    if bad:
        remedy = "open all ports between the nodes, or name the right network in GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        return Finding("ports", "fail", said="; ".join(bad), remedy=remedy)
    return Finding("ports", "ok", said="each node reaches the next")


def check_shared_run_folder(nodes: list[str], ranks: RankInfo, folder: Path) -> Finding:
    """Check that a file that rank 0 writes is visible on all nodes. The file is removed."""
    existing = nearest_existing_folder(folder)
    sharing = probe_shared_folder(existing)
    if sharing.failure is not None:
        message = f"rank 0 cannot write {existing} ({sharing.failure})"
        return Finding("shared folder", "fail", said=message, remedy="name another folder in run.dir")
    blind = [name for index, name in enumerate(nodes) if index * ranks.local_world_size in sharing.blind_ranks]
    if blind:
        message = f"{existing} of {nodes[0]} is not seen by {', '.join(blind)}"
        return Finding("shared folder", "fail", said=message, remedy="name a folder that all nodes share in run.dir")
    return Finding("shared folder", "ok", said=f"what {nodes[0]} writes in {existing} is seen by all")


def check_clocks(nodes: list[str], ranks: RankInfo) -> Finding:
    """Check how far the nodes' clocks differ from rank 0's.

    The skew is measured halfway between request and reply, for the quickest of several requests.
    """
    own_skew_s = 0.0
    for index in range(1, len(nodes)):
        other = index * ranks.local_world_size
        if ranks.rank == other:
            own_skew_s = min(_measure_clock_skew() for _ in range(_REPEATS))[1]
        elif ranks.rank == 0:
            for _ in range(_REPEATS):
                _send_clock(other)
    skews_s = all_gather_json(own_skew_s)[:: ranks.local_world_size]
    worst = max(range(len(nodes)), key=lambda index: abs(skews_s[index]))
    values = {"skew_s": dict(zip(nodes, skews_s, strict=True))}
    if abs(skews_s[worst]) > _SKEW_S:
        message = f"that of {nodes[worst]} is {abs(skews_s[worst]):.1f} s {'ahead' if skews_s[worst] > 0 else 'behind'}"
        remedy = "let the nodes set their clocks (chrony, ntpd)"
        return Finding("clocks", "warn", said=message, remedy=remedy, values=values)
    message = f"within {abs(skews_s[worst]) * 1000:.1f} ms of {nodes[0]}'s"
    return Finding("clocks", "ok", said=message, values=values)


def _measure_clock_skew() -> tuple[float, float]:
    """Return the seconds of a request to rank 0, and the seconds by which this clock is ahead of rank 0's."""
    clock = torch.zeros(1, dtype=torch.float64)
    sent_at = time.time()
    dist.send(clock, 0)
    dist.recv(clock, 0)
    received_at = time.time()
    return received_at - sent_at, (sent_at + received_at) / 2 - float(clock)


def _send_clock(rank: int) -> None:
    clock = torch.zeros(1, dtype=torch.float64)
    dist.recv(clock, rank)
    clock[0] = time.time()
    dist.send(clock, rank)


def check_bandwidth(ranks: RankInfo, device: torch.device) -> list[Finding]:
    """Measure the bandwidth of collectives over each dimension of the meshes.

    `node` is the ranks of a node, which exchange the base by default. `across` is the ranks with one local number on
    all nodes. `world` is all ranks, which exchange adapters. A bandwidth is the bytes per second that a rank receives
    in the slowest group. From an all-gather of n bytes a rank receives (ranks - 1) / ranks * n, and from a ring
    all-reduce twice that.
    """
    local, count = ranks.local_world_size, ranks.world_size // ranks.local_world_size
    mesh = init_device_mesh(device.type, (count, local), mesh_dim_names=("across", "node"))
    dims: list[tuple[str, DeviceMesh | None]] = []
    if local > 1 and count > 1:
        dims += [("node", mesh["node"]), ("across", mesh["across"])]
    dims.append(("world", None))
    return [_bandwidth(name, dim, ranks, device) for name, dim in dims]


def _bandwidth(name: str, mesh: DeviceMesh | None, ranks: RankInfo, device: torch.device) -> Finding:
    group = mesh.get_group() if mesh is not None else None
    size = dist.get_world_size(group)
    speeds: dict[str, float] = {}
    for collective in ("all_gather", "all_reduce"):
        trial = median_seconds(_collective(collective, _TRIAL_BYTES, size, group, device), device, 2)
        nbytes = int(_TRIAL_BYTES * min(max(_TRANSFER_S / trial, 1), _LARGEST_BYTES / _TRIAL_BYTES))
        nbytes = min(all_gather_json(nbytes)) // (4 * size) * 4 * size
        seconds = max(all_gather_json(median_seconds(_collective(collective, nbytes, size, group, device), device)))
        received = nbytes * (size - 1) / size * (2 if collective == "all_reduce" else 1)
        speeds[collective] = received / seconds
    message = ", ".join(f"{collective} {_speed(speed)}" for collective, speed in speeds.items())
    values = {f"{collective}_bytes_per_s": speed for collective, speed in speeds.items()}
    return Finding(f"bandwidth {name}", "ok", said=f"{size} ranks: {message}", values=values)


def _collective(
    name: str, nbytes: int, size: int, group: dist.ProcessGroup | None, device: torch.device
) -> Callable[[], None]:
    whole = torch.zeros(nbytes // 4 // size * size, dtype=torch.float32, device=device)
    if name == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group) and None
    part = torch.zeros(len(whole) // size, dtype=torch.float32, device=device)
    return lambda: dist.all_gather_single(whole, part, group=group) and None


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """Return the median seconds of a call that all ranks of the process group begin at the same time."""
    backend, seconds = torch.get_device_module(device), []
    for _ in range(repeats):
        dist.barrier()
        backend.synchronize()
        started = time.perf_counter()
        call()
        backend.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.1f} MB/s"
