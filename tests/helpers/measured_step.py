"""Bytes that a real rank holds and sends in real steps on a CPU, counted as `trace/trace_step.py` counts them."""

from __future__ import annotations

import torch

from qlora_dist.config.schema import Config
from qlora_dist.data.collate import Batch
from qlora_dist.model.load_weights import fill
from qlora_dist.optim.optimizer_state import Moments
from qlora_dist.parallel.fsdp2 import parallelize
from qlora_dist.parallel.mesh import build_meshes, mesh_sizes
from qlora_dist.parallel.static_bytes import static_bytes
from qlora_dist.runtime.environment import ranks_from_environment
from qlora_dist.runtime.process_group import process_group
from qlora_dist.trace.live_memory import Place
from qlora_dist.trace.trace_step import watch_steps
from qlora_dist.train.run_setup import set_up_model
from qlora_dist.train.train_step import shard_sizes


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
