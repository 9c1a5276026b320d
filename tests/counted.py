"""What a real rank holds and sends in real steps on a CPU, counted as `plan/trace.py` counts those it makes up."""

from __future__ import annotations

import torch

from qlora_dist.config import Config
from qlora_dist.data.rows import Batch
from qlora_dist.launch.environment import ranks_from_environment
from qlora_dist.model.fill import fill
from qlora_dist.optim.moments import Moments
from qlora_dist.parallel.fsdp import parallelize
from qlora_dist.parallel.mesh import build_meshes, mesh_sizes
from qlora_dist.parallel.process_group import process_group
from qlora_dist.parallel.static_bytes import static_bytes
from qlora_dist.plan.live_memory import Place
from qlora_dist.plan.trace import watch_steps
from qlora_dist.train.setup import set_up_model
from qlora_dist.train.step import shard_sizes


def counted(config: Config) -> tuple[int, dict[Place, int], dict[str, int]]:
    """Real steps of a real rank: bytes of its weights, the peaks of what it allocates, and bytes received."""
    ranks = ranks_from_environment()
    sizes = mesh_sizes(config.parallel, ranks)
    folder, model, _ = set_up_model(config)
    with process_group(ranks, torch.device("cpu")):
        meshes = build_meshes(sizes, "cpu")
        traffic = parallelize(model, meshes, config)
        moments = Moments(shard_sizes(model), config.optim, config.paging, torch.device("cpu"))
        fill(model, folder, torch.device("cpu"), 0, meshes.base_replicas)
        shape = config.train.micro_batch, config.data.seq_len
        window = [
            Batch(torch.randint(3, 300, shape), torch.randint(3, 300, shape), torch.arange(shape[1]).expand(shape))
            for _ in range(config.train.global_batch // (shape[0] * ranks.world_size))
        ]
        memory, _ = watch_steps(model, moments, window, sizes.adapter_replicas, config, traffic, steps=2)
        moments.close()
        return static_bytes(model), memory.peaks, traffic.take()
