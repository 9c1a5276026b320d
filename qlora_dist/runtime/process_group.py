"""Joining the other ranks, and leaving them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import RankInfo
from qlora_dist.runtime.interfaces import check_interfaces
from qlora_dist.runtime.rendezvous import join_rendezvous


def resolve_device(name: str, ranks: RankInfo) -> torch.device:
    """The device of this rank.

    Args:
        name: `auto`, `cpu` or `cuda`.
        ranks: whose local rank chooses the GPU.

    Raises:
        UserError: CUDA was asked for and is not there, or there are fewer GPUs than ranks on this node.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device: cuda: this machine has no CUDA device; use cpu or auto")
    count = torch.cuda.device_count()
    if count == 1 and ranks.launcher in ("srun", "mpi"):
        return torch.device("cuda", 0)  # each rank has been given its own, or they share one: preflight sees
    if count < ranks.local_world_size:
        raise UserError(f"{ranks.local_world_size} ranks were started on a node with {count} GPUs; start {count}")
    return torch.device("cuda", ranks.local_rank)


def idle_gpus_warning(ranks: RankInfo, device: torch.device, count: int) -> str | None:
    """Say that a single process leaves GPUs of this machine without work; None: it does not.

    Args:
        ranks: who this process is.
        device: of this rank.
        count: GPUs that it sees.
    """
    if device.type != "cuda" or ranks.launcher != "none" or count <= 1:
        return None
    return f"this process uses one of {count} GPUs; `qlora-dist launch CONFIG --on torchrun` uses all, one rank on each"


@contextmanager
def process_group(ranks: RankInfo, device: torch.device, timeout_s: float = 600.0) -> Iterator[Store]:
    """The default process group: gloo on the CPU, NCCL beside it on CUDA (that branch was not run on a GPU).

    A single process gets a group of one, so that there is one code path.

    Args:
        ranks: this process among all.
        device: of this rank.
        timeout_s: how long to wait for ranks that don't come. A collective waits twice as long: the watchdog, which
            knows who it waits for, is to speak first, and to let those wait whose partner is at work.

    Yields:
        The store where the ranks have met.

    Raises:
        UserError: a rank has not come.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.world_size > 1:
        check_interfaces(device.type)
        store = join_rendezvous(ranks, timeout_s)
    else:
        store = dist.HashStore()
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=2 * timeout_s),
        rank=ranks.rank,
        world_size=ranks.world_size,
        store=store,
    )
    yield store
    # not in a `finally`: after an error the others may be waiting in a collective, and leaving would wait for them
    dist.destroy_process_group()
