"""Who am I? The only place that reads a launcher's variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_dist.errors import UserError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    """`torchrun`, or `none` for a single process."""
    restarts: int = 0
    """How often the launcher has started this again by itself."""


def ranks_from_environment(environ: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that torchrun has set, or a single process where there was no launcher.

    Raises:
        UserError: some of torchrun's variables are set and others not, or they are no numbers.
    """
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        _refuse_other_launchers(environ)
        return Ranks(0, 1, 0, 1, "none", _restarts(environ))
    missing = [name for name in _TORCHRUN if name not in environ]
    if missing:
        raise UserError(
            f"the environment has some of torchrun's variables and not {missing[0]}; start with torchrun, or unset "
            "RANK and WORLD_SIZE"
        )
    try:
        rank, world_size, local_rank, local_world_size = (int(environ[name]) for name in _TORCHRUN[:4])
    except ValueError:
        raise UserError("torchrun's variables in the environment are no numbers; unset RANK and WORLD_SIZE") from None
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise UserError(
            f"the environment says rank {rank} of {world_size}, {local_rank} of {local_world_size} on this node; "
            "start with torchrun, or unset RANK and WORLD_SIZE"
        )
    return Ranks(rank, world_size, local_rank, local_world_size, "torchrun", _restarts(environ))


def _restarts(environ: Mapping[str, str]) -> int:
    """By torchrun (--max-restarts) or by SLURM (requeue)."""
    counts = (environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return sum(int(count) for count in counts if count.isdigit())


@dataclass(frozen=True)
class StoreAddress:
    """Where the ranks meet: a key-value store of torch's."""

    host: str
    port: int
    kept_by_agent: bool
    """torchrun's agent keeps it, and it outlives the ranks; else rank 0 does."""


def store_address(environ: Mapping[str, str] = os.environ) -> StoreAddress:
    """The store's address, as torchrun has set it.

    Raises:
        UserError: the port is none.
    """
    port = environ["MASTER_PORT"]
    if not (port.isdigit() and int(port) < 2**16):
        raise UserError(f"MASTER_PORT is {port} in the environment; give a port below 65536")
    return StoreAddress(environ["MASTER_ADDR"], int(port), environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def started_by_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun's agent is (most likely) this process's parent: no mere setting of RANK and the like."""
    return "TORCHELASTIC_RUN_ID" in environ


def _refuse_other_launchers(environ: Mapping[str, str]) -> None:
    """Under srun or mpirun alone every process would take itself for the only one, and all write one run folder."""
    sizes = {"mpirun": environ.get("OMPI_COMM_WORLD_SIZE") or environ.get("PMI_SIZE")}
    if "SLURM_STEP_ID" in environ:  # set in a batch script's own shell too, without a step
        sizes["srun"] = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS")
    for launcher, size in sizes.items():
        if size is not None and size.isdigit() and int(size) > 1:
            raise UserError(
                f"{launcher} started {size} processes without torchrun; have it start one torchrun on each node"
            )
