"""Default process group and device of a rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import RankInfo
from qlora_dist.runtime.network import check_interfaces
from qlora_dist.runtime.rendezvous import join_rendezvous

_CPUINFO = Path("/proc/cpuinfo")
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of x86 processors, and the feature name of Arm processors."""
_MIN_CAPABILITY = (8, 0)
"""Compute capability of NVIDIA's Ampere."""


def resolve_device(name: str, ranks: RankInfo) -> torch.device:
    """Return the device of this rank. `name` is `auto`, `cpu` or `cuda`, and the local rank selects the GPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device: cuda: this machine has no CUDA device; use cpu or auto")
    count = torch.cuda.device_count()
    if count == 1 and ranks.launcher in ("srun", "mpi"):
        return torch.device("cuda", 0)  # each rank sees only its own GPU; if they share one, a later check fails
    if count < ranks.local_world_size:
        raise UserError(f"{ranks.local_world_size} ranks were started on a node with {count} GPUs; start {count}")
    return torch.device("cuda", ranks.local_rank)


def idle_gpus_warning(ranks: RankInfo, device: torch.device, count: int) -> str | None:
    """Return a warning that a single process leaves GPUs unused, of the `count` that it sees; None if it does not."""
    if device.type != "cuda" or ranks.launcher != "none" or count <= 1:
        return None
    return f"this process uses one of {count} GPUs; `qlora-dist launch CONFIG --on torchrun` uses all, one rank on each"


def bf16_warning(device: torch.device) -> str | None:
    """Return a sentence with the remedy if the device lacks bf16 instructions; None if it has them or may have them."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= _MIN_CAPABILITY:
            return None
        name, number = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        return (
            f"bf16 is emulated and slow on {name} (compute capability {number}, bf16 needs 8.0); "
            "set model.compute_dtype=fp16"
        )
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    if not lines or _BF16_CPU_FLAGS & set(lines[0].split()):
        return None
    return (
        "this processor has no bf16 instructions: bf16 is ten or more times slower here than fp32; "
        "set model.compute_dtype=fp32"
    )


@contextmanager
def process_group(ranks: RankInfo, device: torch.device, timeout_s: float = 600.0) -> Iterator[Store]:
    """Join the default process group, and yield the store of the rendezvous.

    It uses gloo on the CPU, and NCCL as well on CUDA (that branch was not run on a GPU). A single process gets a group
    of one, so that there is one code path.

    Ranks have `timeout_s` seconds to join. A collective waits twice as long, because the watchdog must fire first.
    It can name the missing rank, and can tell a slow rank from a dead one.
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
    # not in a `finally`: after an error the other ranks may wait in a collective, and destroying would wait for them
    dist.destroy_process_group()
