"""Rank, launcher and rendezvous of this process. No other module reads a launcher's environment variables."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from qlora_dist.errors import UserError
from qlora_dist.runtime.process_identity import process_identity

Launcher = Literal["torchrun", "mpi", "srun", "none"]

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_DEEPSPEED_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OPEN_MPI_VARIABLES = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
_HYDRA_VARIABLES = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH, Intel MPI, MVAPICH
_SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID")
_PORTS = range(20_000, 32_000)  # above what services use, below what Linux gives to connections


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Rank of this process, and the number of ranks."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: Launcher
    """Launcher that set the variables. `torchrun` includes DeepSpeed's launcher; `srun` means one process per rank
    without torchrun; `none` means a single process."""


def read_rank_info(environ: Mapping[str, str] = os.environ) -> RankInfo:
    """Return the rank numbers that the innermost launcher has set, or a single process if there is no launcher.

    torchrun and mpirun take precedence over SLURM, whose variables they inherit in a job. The shell of a batch script
    also has task variables but is no task: only a step sets SLURM_STEP_ID.
    """
    launcher = detect_launcher(environ)
    if launcher == "none":
        return RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher=launcher)
    if launcher == "srun":
        return _read_slurm_variables(environ)
    if launcher == "mpi":
        names = _OPEN_MPI_VARIABLES if started_by_open_mpi(environ) else _HYDRA_VARIABLES
    else:
        names = _DEEPSPEED_VARIABLES if started_by_deepspeed(environ) else _TORCHRUN_VARIABLES
    return _read_variables(launcher, environ, names)


def detect_launcher(environ: Mapping[str, str] = os.environ) -> Launcher:
    """Return the innermost launcher, by its variables."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return "torchrun"
    # srun --mpi=pmi2 sets PMI_RANK as well, but numbers the ranks of a node only in SLURM's variables
    hydra = "PMI_SIZE" in environ and ("MPI_LOCALNRANKS" in environ or "SLURM_STEP_ID" not in environ)
    if started_by_open_mpi(environ) or hydra:
        return "mpi"
    return "srun" if "SLURM_STEP_ID" in environ else "none"


def _read_variables(launcher: Launcher, environ: Mapping[str, str], names: tuple[str, ...]) -> RankInfo:
    command = "mpirun" if launcher == "mpi" else "deepspeed" if names is _DEEPSPEED_VARIABLES else "torchrun"
    missing = [name for name in names if name not in environ]
    if missing:
        raise UserError(
            f"the environment has some of {command}'s variables and not {missing[0]}; start with {command}, or unset "
            f"{names[0]} and {names[1]}"
        )
    rank, world_size, local_rank, local_world_size = _parse_ints(command, environ, names[:4])
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise UserError(
            f"the environment says rank {rank} of {world_size}, {local_rank} of {local_world_size} on this node; "
            f"start with {command}, or unset {names[0]} and {names[1]}"
        )
    return RankInfo(
        rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size, launcher=launcher
    )


def _read_slurm_variables(environ: Mapping[str, str]) -> RankInfo:
    missing = [name for name in (*_SLURM_VARIABLES, "SLURM_STEP_TASKS_PER_NODE") if name not in environ]
    if missing:
        raise UserError(
            f"the environment is a SLURM step's (SLURM_STEP_ID) without {missing[0]}; start with srun, or unset "
            "SLURM_STEP_ID"
        )
    rank, world_size, local_rank, _ = _parse_ints("srun", environ, _SLURM_VARIABLES)
    tasks = environ["SLURM_STEP_TASKS_PER_NODE"]  # such as 8(x3),4
    sizes = {int(size) for size in re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", tasks)}
    if len(sizes) != 1:
        raise UserError(f"srun started {tasks} tasks on the nodes; start equally many on each (--ntasks-per-node)")
    return RankInfo(
        rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=sizes.pop(), launcher="srun"
    )


def _parse_ints(command: str, environ: Mapping[str, str], names: tuple[str, ...]) -> tuple[int, ...]:
    try:
        return tuple(int(environ[name]) for name in names)
    except ValueError:
        raise UserError(
            f"{command}'s variables in the environment are not numbers; unset {names[0]} and {names[1]}"
        ) from None


@dataclass(frozen=True)
class StoreAddress:
    """Address of the torch key-value store that the ranks join through."""

    host: str
    port: int


def store_address(environ: Mapping[str, str] = os.environ) -> StoreAddress | None:
    """Return MASTER_ADDR and MASTER_PORT, or else the first node of the SLURM step and a port derived from the step.

    Return None if the environment gives no address. Under mpirun rank 0 chooses it.
    """
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if detect_launcher(environ) == "srun":
        host, port = host or _first_host(environ), port or str(_slurm_port(environ))
    if not host or not port:
        return None
    if not (port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT is {port} in the environment; give a port below 65536")
    return StoreAddress(host, int(port))


def agent_hosts_store(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun's agent keeps the store, which then outlives the ranks. Otherwise rank 0 keeps it."""
    return "RANK" in environ and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def master_addr(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the name of rank 0's machine from the environment, or None."""
    return environ.get("MASTER_ADDR") or None


def torchrun_error_file(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the file from which torchrun reads why this rank failed; None without torchrun."""
    path = environ.get("TORCHELASTIC_ERROR_FILE")
    return None if path is None else Path(path)


def set_store_address(host: str, port: int) -> None:
    """Set the store's address for this process. torch reads the same variables."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)


def set_local_rank(index: int) -> None:
    """Set LOCAL_RANK for libraries that read it, because some launchers leave it unset."""
    os.environ["LOCAL_RANK"] = str(index)


def _first_host(environ: Mapping[str, str]) -> str:
    """Return the first host of a list such as `gpu[01-03,07]-ib,cpu1`: gpu01-ib, where SLURM places rank 0.

    On a single node return the loopback address, because the node's name need not resolve there.
    """
    if environ.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    first = re.match(r"(?:\[[^]]*\]|[^],[])+", hosts)
    if first is None:
        raise UserError("the SLURM step names no nodes (SLURM_STEP_NODELIST); set MASTER_ADDR to rank 0's node")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0])


def _slurm_port(environ: Mapping[str, str]) -> int:
    """Derive the port from job, step and restart count.

    Jobs and steps on one node, and a requeued job and its predecessor, must not use the same port.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restarts = (int(text) if (text := environ.get(name, "")).isdigit() else 0 for name in names)
    return _PORTS[(97 * job + 7 * step + restarts) % len(_PORTS)]


def rendezvous_id(environ: Mapping[str, str] = os.environ) -> str:
    """Return an identifier of the SLURM step, so that ranks of two jobs on one port do not join each other."""
    if detect_launcher(environ) != "srun":
        return ""
    names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return "/".join(environ.get(name, "") for name in names)


def process_record(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return what identifies this process to others: its machine, process numbers, SLURM job and step, and nodes."""
    job, step = environ.get("SLURM_JOB_ID"), environ.get("SLURM_STEP_ID")
    own_parent = detect_launcher(environ) == "mpi" or started_by_torchrun(environ)
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **process_identity(os.getpid()),
        "launcher_pid": os.getppid() if own_parent else None,
        "job_id": f"{job}.{step}" if job and step else job,
        "nodes": environ.get("SLURM_JOB_NODELIST"),
    }


def launch_id(environ: Mapping[str, str] = os.environ) -> dict[str, str | None]:
    """Return what identifies the launch of this process, so that `is_same_launch` recognizes it after a restart.

    `agent` names torchrun's agent on this node, and `torchrun` its run id. `job` is the SLURM job or job array, and
    `start` its array index and restart count.
    """
    agent = run_id = job = None
    if started_by_torchrun(environ):
        run_id = environ["TORCHELASTIC_RUN_ID"]
        with suppress(psutil.Error):
            born = process_identity(os.getppid())
            agent = f"{socket.gethostname()}/{os.getppid()}/{born.get('start_ticks', born['born'])}"
    number = environ.get("SLURM_ARRAY_JOB_ID") or environ.get("SLURM_JOB_ID")
    if number:
        job = f"{environ.get('SLURM_CLUSTER_NAME', '')}/{number}"
    start = "/".join(environ.get(name) or "0" for name in ("SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"))
    return {"agent": agent, "torchrun": run_id, "job": job, "start": start}


def is_same_launch(before: object, now: Mapping[str, str | None], environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher has restarted its command, from the values of `launch_id` `before` and `now`.

    A second command in one SLURM job is another launch. A requeued job and an array's next job are the same launch.
    """
    if not isinstance(before, Mapping):
        return False

    def matches(key: str) -> bool:
        return now[key] is not None and before.get(key) == now[key]

    restarted = environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if matches("agent") or (restarted and matches("torchrun") and now["torchrun"] != "none"):
        return True
    return matches("job") and before.get("start") != now["start"]


def started_by_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun's agent is most likely this process's parent. RANK alone may have been set by hand."""
    return "TORCHELASTIC_RUN_ID" in environ


def started_by_deepspeed(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the `deepspeed` command has numbered the ranks."""
    return "CROSS_SIZE" in environ and "LOCAL_WORLD_SIZE" not in environ


def started_by_open_mpi(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether Open MPI's mpirun has numbered the ranks."""
    return "OMPI_COMM_WORLD_SIZE" in environ
