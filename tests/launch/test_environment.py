"""If this fails, a process takes itself for another rank, or for a single one among many."""

from __future__ import annotations

import pytest

from qlora_dist.errors import UserError
from qlora_dist.launch.environment import Ranks, StoreAddress, ranks_from_environment, store_address

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "HOME": "/home/me",
}


def test_torchrun():
    assert ranks_from_environment(TORCHRUN) == Ranks(5, 8, 1, 4, "torchrun")


def test_no_launcher_is_a_single_process():
    # a scheduler's or a shell's leftovers do not make a rank
    for environ in ({}, {"HOME": "/home/me", "MASTER_ADDR": "node0", "LOCAL_RANK": "3"}):
        assert ranks_from_environment(environ) == Ranks(0, 1, 0, 1, "none")


@pytest.mark.parametrize("name", [name for name in TORCHRUN if name != "HOME"])
def test_one_variable_missing_is_refused_and_named(name):
    environ = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(UserError, match=f"not {name};"):
        ranks_from_environment(environ)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["", "two", "1.5"])
def test_variables_that_are_no_numbers_are_refused(name, value):
    with pytest.raises(UserError, match="no numbers"):
        ranks_from_environment(TORCHRUN | {name: value})


def test_reads_the_environment_of_the_process(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert ranks_from_environment().rank == 5


def test_who_keeps_the_store():
    environ = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    assert store_address(environ) == StoreAddress("n1", 29500, kept_by_agent=False)
    assert store_address(environ | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).kept_by_agent
    with pytest.raises(UserError, match="MASTER_PORT is 99999 in the environment; give a port below 65536"):
        store_address(environ | {"MASTER_PORT": "99999"})
