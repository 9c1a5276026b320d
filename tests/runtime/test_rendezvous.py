"""If this fails, restarted ranks wait for ranks of the previous attempt."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from qlora_dist.errors import UserError
from qlora_dist.runtime import network, rendezvous
from qlora_dist.runtime.environment import RankInfo
from qlora_dist.runtime.rendezvous import join_rendezvous


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.TCPStore]:
    """Store that torchrun's agent keeps across restarts of the ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    yield store


def rank(number: int, world_size: int = 3) -> RankInfo:
    return RankInfo(
        rank=number, world_size=world_size, local_rank=number, local_world_size=world_size, launcher="torchrun"
    )


def test_a_restarted_rank_waits_for_the_new_first_rank(agent):
    with ThreadPoolExecutor(3) as pool:
        for attempt in ("first", "second", "third"):
            early = [pool.submit(join_rendezvous, rank(number), 60) for number in (1, 2)]
            threading.Event().wait(0.3)  # the ranks find entries of the previous attempt and must ignore them
            assert not any(future.done() for future in early)
            stores = [join_rendezvous(rank(0), 60), *(future.result() for future in early)]
            assert not stores[0].check(["written by"])
            stores[0].set("written by", attempt)
            assert [store.get("written by").decode() for store in stores] == [attempt] * 3


def test_a_rank_that_does_not_join_is_named(agent):
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(join_rendezvous, rank(1), 1.0)
        with pytest.raises(
            UserError, match=r"^rank 2 of 3 did not join within 1 s; look at its node's output"
        ) as error:
            join_rendezvous(rank(0), 1.0)
        assert error.value.local_only
        with pytest.raises(UserError, match=r"^rank 0, or a rank that it waits for, of 3 did not join") as error:
            other.result()
        assert not error.value.local_only  # the first rank of its node reports it
        with pytest.raises(UserError, match=r"^rank 1 \(nor 1 more\) of 3"):
            join_rendezvous(rank(0), 0.5)


def test_a_store_that_is_not_there(monkeypatch, agent):
    monkeypatch.setenv("MASTER_PORT", "1")
    message = r"^no connection to rank 0 at 127.0.0.1:1 \(.*check that rank 0 is started there"
    with pytest.raises(UserError, match=message):
        join_rendezvous(rank(1), 1.0)


def test_a_silent_program_at_the_port(monkeypatch, agent):
    """torch ignores its timeout here and waits for ever, while the other ranks' GPUs idle."""
    monkeypatch.setattr(rendezvous, "_CONNECT_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MASTER_PORT", str(silent.getsockname()[1]))
        with pytest.raises(UserError, match=r"\(what listens there does not answer, and is not rank 0\); check that"):
            join_rendezvous(rank(1), 600)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
        with pytest.raises(UserError, match=r"^no connection to rank 0 at .*that no other program uses the port"):
            join_rendezvous(rank(0), 600)  # rank 0 cannot listen there


def test_a_master_without_an_address(monkeypatch, agent):
    monkeypatch.setattr(network, "_DNS_TIMEOUT_S", 0.0)
    monkeypatch.setenv("MASTER_ADDR", "node0.invalid")
    with pytest.raises(UserError, match=r"^node0\.invalid: .* cannot resolve this name of rank 0's machine"):
        join_rendezvous(rank(1), 600)
