"""If this fails, a process uses another rank's number, or runs alone although it is one of several ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import (
    RankInfo,
    StoreAddress,
    agent_hosts_store,
    read_rank_info,
    rendezvous_id,
    store_address,
)

PACKAGE = Path(__file__).resolve().parents[2] / "qlora_dist"

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "HOME": "/home/me",
}
DEEPSPEED = {  # set by `deepspeed`
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
JOB = {  # set by SLURM 22.05 for all steps, and for the shell of a batch script
    "SLURM_JOB_ID": "123",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
STEP = JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
PMI2 = STEP | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "9"}
"""srun --mpi=pmi2"""
PROXY = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}
"""Variables that SLURM sets for MPICH's proxy process on a node, which starts the ranks there."""


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        (TORCHRUN, RankInfo(rank=5, world_size=8, local_rank=1, local_world_size=4, launcher="torchrun")),
        (DEEPSPEED, RankInfo(rank=5, world_size=8, local_rank=1, local_world_size=4, launcher="torchrun")),
        (OPEN_MPI, RankInfo(rank=2, world_size=4, local_rank=0, local_world_size=2, launcher="mpi")),
        (HYDRA, RankInfo(rank=3, world_size=4, local_rank=1, local_world_size=2, launcher="mpi")),
        (STEP, RankInfo(rank=3, world_size=4, local_rank=1, local_world_size=2, launcher="srun")),
        (PMI2, RankInfo(rank=3, world_size=4, local_rank=1, local_world_size=2, launcher="srun")),
        (
            STEP | {"SLURM_STEP_TASKS_PER_NODE": "2,2"},
            RankInfo(rank=3, world_size=4, local_rank=1, local_world_size=2, launcher="srun"),
        ),
        (
            STEP | {"SLURM_RESTART_COUNT": "2"},
            RankInfo(rank=3, world_size=4, local_rank=1, local_world_size=2, launcher="srun"),
        ),
        # a launcher inside another one: the inner one numbers the ranks
        (STEP | TORCHRUN, RankInfo(rank=5, world_size=8, local_rank=1, local_world_size=4, launcher="torchrun")),
        (OPEN_MPI | TORCHRUN, RankInfo(rank=5, world_size=8, local_rank=1, local_world_size=4, launcher="torchrun")),
        (PROXY | HYDRA, RankInfo(rank=3, world_size=4, local_rank=1, local_world_size=2, launcher="mpi")),
        (PROXY | OPEN_MPI, RankInfo(rank=2, world_size=4, local_rank=0, local_world_size=2, launcher="mpi")),
        # the shell of a batch script, or leftover variables, make no rank
        (JOB, RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")),
        ({}, RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")),
        (
            {"HOME": "/home/me", "MASTER_ADDR": "node0", "LOCAL_RANK": "3"},
            RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none"),
        ),
    ],
)
def test_ranks_are_read_from_the_environment(environ, ranks):
    assert read_rank_info(environ) == ranks


@pytest.mark.parametrize(
    ("complete", "name"),
    [
        *((TORCHRUN, name) for name in TORCHRUN if name != "HOME"),
        *((DEEPSPEED, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR")),
        *((OPEN_MPI, name) for name in OPEN_MPI if name != "OMPI_COMM_WORLD_SIZE"),
        *((HYDRA, name) for name in HYDRA if name != "PMI_SIZE"),
        *((STEP, name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")),
    ],
)
def test_one_variable_missing_is_refused_and_named(complete, name):
    environ = {key: value for key, value in complete.items() if key != name}
    with pytest.raises(UserError, match=f"(not|without) {name};"):
        read_rank_info(environ)


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        *((TORCHRUN, name) for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]),
        *((environ, next(iter(environ))) for environ in (OPEN_MPI, HYDRA)),
        (STEP, "SLURM_PROCID"),
    ],
)
@pytest.mark.parametrize("value", ["", "two", "1.5"])
def test_variables_that_are_not_numbers_are_refused(environ, name, value):
    with pytest.raises(UserError, match="not numbers"):
        read_rank_info(environ | {name: value})


def test_unequal_nodes_are_refused_on_all_ranks_with_the_same_sentence():
    # the node's own number would show it on the smaller node only
    for node in ("0", "1"):
        environ = STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": node}
        with pytest.raises(UserError, match=re.escape("srun started 2(x3),1 tasks on the nodes; start equally many")):
            read_rank_info(environ)


def test_reads_the_environment_of_the_process(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert read_rank_info().rank == 5


def test_only_one_module_reads_a_launchers_variables():
    # OMPI_ALLOW_RUN_AS_ROOT and SLURM_CONF are settings, and contain no rank
    other = r"(?!OMPI_ALLOW|SLURM_CONF)"
    variables = re.compile(
        rf"[\"'](RANK|WORLD_SIZE|LOCAL_\w+|{other}(TORCHELASTIC|OMPI|PMIX?|MPI|SLURM|MASTER)_\w+)[\"']"
    )
    files = [path for path in PACKAGE.rglob("*.py") if variables.search(path.read_text())]
    assert [path.name for path in files] == ["environment.py"]


@pytest.mark.parametrize(
    ("environ", "host"),
    [
        (TORCHRUN, "node0"),
        (STEP, "n1"),
        (STEP | {"MASTER_ADDR": "10.0.0.1"}, "10.0.0.1"),
        (STEP | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "n2"}, "127.0.0.1"),
        (STEP | {"SLURM_STEP_NODELIST": "cpu7,gpu[01-03,07]"}, "cpu7"),
        (STEP | {"SLURM_STEP_NODELIST": "gpu[03,07-09]-ib,cpu7"}, "gpu03-ib"),
        (STEP | {"SLURM_STEP_NODELIST": "rack[2-3]n[10-11].site.org"}, "rack2n10.site.org"),
    ],
)
def test_address_of_the_store(environ, host):
    assert store_address(environ).host == host


def test_steps_and_restarts_have_different_ports():
    changes = [{}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "124"}]
    ports = [store_address(STEP | change).port for change in changes]
    assert len(set(ports)) == 4
    assert all(20_000 <= port < 32_000 for port in ports)
    assert store_address(STEP | {"MASTER_PORT": "29500"}).port == 29500


def test_jobs_with_the_same_port_do_not_join_each_other():
    step = {"SLURM_CLUSTER_NAME": "c", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}
    names = {rendezvous_id(step | {key: "3"}) for key in step}
    assert len(names | {rendezvous_id(step)}) == 5
    assert rendezvous_id({"RANK": "0", "WORLD_SIZE": "2", **step}) == ""


def test_under_mpirun_rank_0_chooses():
    assert store_address(OPEN_MPI) is None
    assert store_address(OPEN_MPI | {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}) == StoreAddress("n1", 29500)


def test_a_step_without_nodes_is_refused():
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        store_address({name: value for name, value in STEP.items() if "NODELIST" not in name})


def test_who_keeps_the_store():
    assert not agent_hosts_store(TORCHRUN)
    assert agent_hosts_store(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert not agent_hosts_store(STEP | {"TORCHELASTIC_USE_AGENT_STORE": "True"})


@pytest.mark.parametrize("port", ["99999", "0", "http"])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(UserError, match=f"MASTER_PORT is {port} in the environment; give a port below 65536"):
        store_address(TORCHRUN | {"MASTER_PORT": port})
