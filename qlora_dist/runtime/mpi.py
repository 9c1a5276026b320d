"""Ranks that mpirun has started: how they find each other, and how they leave.

MPI is there for one broadcast. Training communicates by NCCL and gloo, which know nothing of it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Mapping

import psutil

from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import (
    RankInfo,
    read_rank_info,
    set_store_address,
    started_by_open_mpi,
    store_address,
)
from qlora_dist.runtime.interfaces import matches_nccl_ifname

_REMEDY = "or set MASTER_ADDR and MASTER_PORT"
_listening_socket: socket.socket | None = None


def share_store_address() -> None:
    """Have rank 0 say where the ranks are going to meet. Called on all ranks, before anything that takes long.

    Nothing happens under another launcher, or if the environment says where.

    Raises:
        UserError: there is no mpi4py, or it is another MPI's than mpirun.
    """
    ranks = read_rank_info()
    if ranks.launcher == "mpi" and ranks.world_size > 1 and store_address() is None:
        set_store_address(*_broadcast(_open_listening_socket(ranks) if ranks.rank == 0 else None, ranks))


def take_listening_socket() -> int | None:
    """Hand over the socket that rank 0 listens on since its address was told, so that nobody else takes the port."""
    global _listening_socket
    taken, _listening_socket = _listening_socket, None
    return None if taken is None else taken.detach()


def _broadcast(value: tuple[str, int] | None, ranks: RankInfo) -> tuple[str, int]:
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter where there is no MPI library for it
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"mpirun started {ranks.world_size} ranks, which find each other by mpi4py, and there is none that works "
            f"({reason}); install mpi4py, {_REMEDY}"
        ) from None
    library = " ".join(MPI.Get_library_version().split("\n")[0].split(",")[0].split())
    if library.startswith("Open MPI") != started_by_open_mpi():  # its ranks would end with an abort, or be alone each
        raise UserError(
            f"mpi4py uses {library}, and the mpirun that started {ranks.world_size} ranks is of another MPI; use the "
            f"mpirun of the one that mpi4py has, {_REMEDY}"
        )
    MPI.Init()
    assert MPI.COMM_WORLD.Get_size() == ranks.world_size
    value = MPI.COMM_WORLD.bcast(value, root=0)
    # at once: a rank that fails must not wait for the others at its end, nor be told off for leaving without
    MPI.Finalize()
    assert value is not None
    return value


def _open_listening_socket(ranks: RankInfo) -> tuple[str, int]:
    global _listening_socket
    dual_stack = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual_stack else socket.AF_INET
    _listening_socket = socket.create_server(("", 0), family=family, backlog=2048, dualstack_ipv6=dual_stack)
    host = "127.0.0.1" if ranks.local_world_size == ranks.world_size else reachable_address()
    return host, _listening_socket.getsockname()[1]


def reachable_address(environ: Mapping[str, str] = os.environ) -> str:
    """An address by which other nodes reach this one.

    That of the interface that gloo or NCCL are told to use; else what the host's name stands for; else that of the
    first interface that is up.

    Raises:
        UserError: there is none.
    """
    interfaces = _interface_addresses()
    if named := environ.get("GLOO_SOCKET_IFNAME"):
        interfaces = {name: interfaces[name] for name in named.split(",") if name in interfaces}
    elif named := environ.get("NCCL_SOCKET_IFNAME"):
        interfaces = {name: there for name, there in interfaces.items() if matches_nccl_ifname(name, named)}
    else:
        with contextlib.suppress(OSError):
            for *_, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
                if not ipaddress.ip_address(address[0]).is_loopback:  # Debian's own name is 127.0.1.1
                    return str(address[0])
    address_found = next((address for there in interfaces.values() for address in there), None)
    if address_found is None:
        raise UserError(
            "rank 0's machine has no address that other nodes reach; name its network interface in GLOO_SOCKET_IFNAME, "
            f"{_REMEDY}",
            local_only=True,
        )
    return address_found


def _interface_addresses() -> dict[str, list[str]]:
    """Of the interfaces that are up, without loopback and link-local ones; IPv4 first."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        usable = [
            entry.address
            for family in (socket.AF_INET, socket.AF_INET6)
            for entry in entries
            if entry.family == family
            and not (ip := ipaddress.ip_address(entry.address)).is_loopback
            and not ip.is_link_local
        ]
        if name in up and usable:
            found[name] = usable
    return found
