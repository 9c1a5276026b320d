"""Rendezvous of the ranks through the launcher's store, separately for each attempt.

With `--max-restarts` torchrun starts all ranks again, and its store still holds the addresses of the old ranks. As of
2.13, torch would take them for the new ones. So each attempt uses a separate part of the store, called a round. Its
number cannot be torchrun's restart count, because a node does not increase it when another node caused the restart.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import RankInfo, StoreAddress, agent_hosts_store, rendezvous_id, store_address
from qlora_dist.runtime.mpi import take_listening_socket
from qlora_dist.runtime.network import check_rendezvous_host

_ATTEMPT = "attempt"
_LONGEST_SLEEP_S = 0.2
_CONNECT_TIMEOUT_S = 30.0
"""Seconds that a store may take to answer a rank that has connected."""


def join_rendezvous(ranks: RankInfo, timeout_s: float) -> Store:
    """Wait until all ranks have joined. Return the part of the store that only the ranks of this attempt use.

    Raises:
        UserError: a rank did not join in time, or the store cannot be reached.
    """
    end = time.monotonic() + timeout_s
    address = store_address()
    if address is None:
        raise UserError("the environment gives no address of rank 0; set MASTER_ADDR and MASTER_PORT")
    store = PrefixStore(f"qlora-dist/{rendezvous_id()}", _connect(address, ranks, timeout_s))
    round_store = _open_round(store, ranks, end) if ranks.rank == 0 else _join_round(store, ranks, end)
    if round_store is None:
        raise UserError(
            f"{_missing_ranks(store, ranks)} of {ranks.world_size} did not join within {timeout_s:.0f} s; look at its "
            "node's output, and raise train.timeout if it is only slow",
            local_only=ranks.local_rank == 0,
            retryable=True,
        )
    return round_store


def _connect(address: StoreAddress, ranks: RankInfo, timeout_s: float) -> Store:
    """Connect to the store, or open it on rank 0."""
    check_rendezvous_host(address.host)
    results: list[Store | dist.DistError] = []

    def connect() -> None:
        try:
            store = dist.TCPStore(
                address.host,
                address.port,
                is_master=ranks.rank == 0 and not agent_hosts_store(),
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=take_listening_socket(),
            )
            results.append(store)
        except dist.DistError as error:
            results.append(error)

    # in a thread, because torch's timeout does not apply to a listener that accepts and never answers
    thread = threading.Thread(target=connect, name="store", daemon=True)
    thread.start()
    silent_since = None
    while not results:
        thread.join(0.5)
        if not thread.is_alive():
            break
        if silent_since is None and _listens(address):
            silent_since = time.monotonic()
        if silent_since is not None and time.monotonic() - silent_since > _CONNECT_TIMEOUT_S:
            raise _rendezvous_error(address, "what listens there does not answer, and is not rank 0")
    (store,) = results
    if isinstance(store, dist.DistError):
        raise _rendezvous_error(address, str(store).strip().split("\n")[0])
    return store


def _listens(address: StoreAddress) -> bool:
    with (
        suppress(OSError),
        socket.create_connection((address.host, address.port), timeout=_CONNECT_TIMEOUT_S) as connection,
    ):
        # a free port may connect a caller to itself
        return bool(connection.getsockname() != connection.getpeername())
    return False


def _rendezvous_error(address: StoreAddress, reason: str) -> UserError:
    return UserError(
        f"no connection to rank 0 at {address.host}:{address.port} ({reason}); check that rank 0 is started there, "
        "that this machine reaches it, and that no other program uses the port (MASTER_PORT)",
        local_only=True,
        retryable=True,
    )


def _open_round(store: Store, ranks: RankInfo, end: float) -> Store | None:
    """Open a round on rank 0, and publish its members once all ranks have joined. Return None at the time limit."""
    attempt = store.add(_ATTEMPT, 1)
    round_store = PrefixStore(f"{_ATTEMPT}/{attempt}", store)
    others = [f"came/{rank}" for rank in range(1, ranks.world_size)]
    while not round_store.check(others):
        if time.monotonic() > end:
            return None
        time.sleep(0.02)
    round_store.set("all", json.dumps([key.decode() for key in round_store.multi_get(others)]))
    return round_store


def _join_round(store: Store, ranks: RankInfo, end: float) -> Store | None:
    """Join the newest round until rank 0 lists this process, which a stale round never does.

    Return None at the time limit.
    """
    name = secrets.token_hex(8)
    joined_round, sleep_s = 0, 0.01
    while time.monotonic() < end:
        attempt = store.add(_ATTEMPT, 0)
        round_store = PrefixStore(f"{_ATTEMPT}/{attempt}", store)
        if attempt > joined_round:
            round_store.set(f"came/{ranks.rank}", name)
            joined_round = attempt
        if attempt and round_store.check(["all"]) and name in json.loads(round_store.get("all")):
            return round_store
        time.sleep(sleep_s)
        sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)
    return None


def _missing_ranks(store: Store, ranks: RankInfo) -> str:
    if ranks.rank != 0:
        return "rank 0, or a rank that it waits for,"
    round_store = PrefixStore(f"{_ATTEMPT}/{store.add(_ATTEMPT, 0)}", store)
    missing = [rank for rank in range(1, ranks.world_size) if not round_store.check([f"came/{rank}"])]
    more = f" (nor {len(missing) - 1} more)" if len(missing) > 1 else ""
    return f"rank {missing[0]}{more}" if missing else "a rank"  # it joined just after the time limit
