"""Rendezvous of ranks that mpirun has started.

MPI is used for one broadcast only, of the store's address. Training communicates through NCCL and gloo.
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
from qlora_dist.runtime.network import matches_nccl_ifname

_REMEDY = "or set MASTER_ADDR and MASTER_PORT"
_listening_socket: socket.socket | None = None


def share_store_address() -> None:
    """Broadcast the store's address from rank 0. Call it on all ranks, before anything that takes long.

    Nothing happens under another launcher, or if the environment gives the address.
    """
    ranks = read_rank_info()
    if ranks.launcher == "mpi" and ranks.world_size > 1 and store_address() is None:
        set_store_address(*_broadcast(_open_listening_socket(ranks) if ranks.rank == 0 else None, ranks))


def take_listening_socket() -> int | None:
    """Return the socket that rank 0 has kept open, so that no other program takes the broadcast port; None elsewhere.

    The caller owns the file descriptor.
    """
    global _listening_socket
    listener, _listening_socket = _listening_socket, None
    return None if listener is None else listener.detach()


def _broadcast(value: tuple[str, int] | None, ranks: RankInfo) -> tuple[str, int]:
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError if mpi4py finds no MPI library
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"mpirun started {ranks.world_size} ranks, which need mpi4py to connect, and it does not work here "
            f"({reason}); install mpi4py, {_REMEDY}"
        ) from None
    library = " ".join(MPI.Get_library_version().split("\n")[0].split(",")[0].split())
    # mixing MPIs ends with an abort, or gives each rank a world of its own
    if library.startswith("Open MPI") != started_by_open_mpi():
        raise UserError(
            f"mpi4py uses {library}, and the mpirun that started {ranks.world_size} ranks belongs to another MPI; use "
            f"the mpirun of mpi4py's MPI, {_REMEDY}"
        )
    MPI.Init()
    assert MPI.COMM_WORLD.Get_size() == ranks.world_size
    value = MPI.COMM_WORLD.bcast(value, root=0)
    # finalize now: a rank that fails later must neither wait for the others nor be reported for not finalizing
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
    """Return an address by which other nodes reach this one.

    GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME take precedence. Otherwise it is the address of the host name, or that of
    the first interface that is up.
    """
    interfaces = _interface_addresses()
    if named := environ.get("GLOO_SOCKET_IFNAME"):
        interfaces = {name: interfaces[name] for name in named.split(",") if name in interfaces}
    elif named := environ.get("NCCL_SOCKET_IFNAME"):
        interfaces = {name: found for name, found in interfaces.items() if matches_nccl_ifname(name, named)}
    else:
        with contextlib.suppress(OSError):
            for *_, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
                if not ipaddress.ip_address(address[0]).is_loopback:  # Debian maps the host's own name to 127.0.1.1
                    return str(address[0])
    first_address = next((address for addresses in interfaces.values() for address in addresses), None)
    if first_address is None:
        raise UserError(
            "rank 0's machine has no address that other nodes reach; name its network interface in GLOO_SOCKET_IFNAME, "
            f"{_REMEDY}",
            local_only=True,
        )
    return first_address


def _interface_addresses() -> dict[str, list[str]]:
    """Return the addresses of the interfaces that are up, IPv4 first, without loopback and link-local ones."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    addresses: dict[str, list[str]] = {}
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
            addresses[name] = usable
    return addresses
