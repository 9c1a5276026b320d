"""Meeting the other ranks at the launcher's store: those of this attempt, not of an earlier one.

With `--max-restarts` torchrun starts all ranks again, and its store still holds the addresses of those that are gone.
torch would take them for the new ones (as of 2.13). So every attempt has a part of the store of its own. Its number
can't be torchrun's count of restarts, which a node doesn't increase when it starts again for another's sake.
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
from qlora_dist.runtime.hosts import check_rendezvous_host
from qlora_dist.runtime.mpi import take_listening_socket

_ATTEMPT = "attempt"
_LONGEST_SLEEP_S = 0.2
_CONNECT_TIMEOUT_S = 30.0
"""Seconds that a store may take to answer a rank that has connected."""


def join_rendezvous(ranks: RankInfo, timeout_s: float) -> Store:
    """Wait until all ranks are there.

    Returns:
        A part of the store that only the ranks of this attempt use.

    Raises:
        UserError: a rank has not come in time, or the store is not there.
    """
    end = time.monotonic() + timeout_s
    address = store_address()
    if address is None:
        raise UserError("the environment does not say where the ranks can meet; set MASTER_ADDR and MASTER_PORT")
    store = PrefixStore(f"qlora-dist/{rendezvous_id()}", _connect(address, ranks, timeout_s))
    round_store = _open_round(store, ranks, end) if ranks.rank == 0 else _join_round(store, ranks, end)
    if round_store is None:
        raise UserError(
            f"{_missing_ranks(store, ranks)} of {ranks.world_size} has not come within {timeout_s:.0f} s; look at its node's "
            "output, and raise train.timeout if it is only slow",
            local_only=ranks.local_rank == 0,
            retryable=True,
        )
    return round_store


def _connect(address: StoreAddress, ranks: RankInfo, timeout_s: float) -> Store:
    """Connect to the store, or open it on rank 0.

    Raises:
        UserError: its machine is not known, it is not there, or who listens there is no store.
    """
    check_rendezvous_host(address.host)
    made: list[Store | dist.DistError] = []

    def make() -> None:
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
            made.append(store)
        except dist.DistError as error:
            made.append(error)

    # in a thread: torch heeds its timeout while nothing listens, and waits for ever for a listener that is silent
    attempt = threading.Thread(target=make, name="store", daemon=True)
    attempt.start()
    silent_since = None
    while not made:
        attempt.join(0.5)
        if not attempt.is_alive():
            break
        if silent_since is None and _listens(address):
            silent_since = time.monotonic()
        if silent_since is not None and time.monotonic() - silent_since > _CONNECT_TIMEOUT_S:
            raise _rendezvous_error(address, "what listens there does not answer, and is not rank 0")
    (store,) = made
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
        f"the ranks can't meet at {address.host}:{address.port} ({reason}); see that rank 0 is started there, that "
        "this machine reaches it, and that no other program has the port (MASTER_PORT)",
        local_only=True,
        retryable=True,
    )


def _open_round(store: Store, ranks: RankInfo, end: float) -> Store | None:
    """Rank 0: open an attempt, and say who has come to it."""
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
    """The others: come to the newest attempt, until rank 0 names this very process. A stale attempt's never does."""
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
        return "rank 0, or one that it waits for,"
    round_store = PrefixStore(f"{_ATTEMPT}/{store.add(_ATTEMPT, 0)}", store)
    missing = [rank for rank in range(1, ranks.world_size) if not round_store.check([f"came/{rank}"])]
    more = f" (nor {len(missing) - 1} more)" if len(missing) > 1 else ""
    return f"rank {missing[0]}{more}" if missing else "a rank"  # it comes too late, just now
