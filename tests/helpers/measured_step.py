"""Bytes that a real rank holds and receives in steps on a CPU, counted as `trace/trace_step.py` counts them."""

from __future__ import annotations

import torch

from qlora_dist.config.schema import Config
from qlora_dist.data.collate import Batch
from qlora_dist.model.load_weights import load_weights
from qlora_dist.optim.optimizer_state import PagedOptimizerState
from qlora_dist.parallel.fsdp2 import parallelize_fsdp2
from qlora_dist.parallel.mesh import build_meshes, mesh_sizes
from qlora_dist.parallel.static_bytes import model_static_bytes
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.trace.live_memory import LayerPhase
from qlora_dist.trace.trace_step import record_peaks
from qlora_dist.train.run_setup import set_up_model
from qlora_dist.train.train_step import adapter_shard_numels


def measure_step(config: Config) -> tuple[int, dict[LayerPhase, int], dict[str, int]]:
    """Run real steps, and return a rank's bytes of weights, its peaks by phase, and the bytes that it received."""
    ranks = read_rank_info()
    sizes = mesh_sizes(config.parallel, ranks)
    folder, model, _ = set_up_model(config)
    with process_group(ranks, torch.device("cpu")):
        meshes = build_meshes(sizes, "cpu")
        traffic = parallelize_fsdp2(model, meshes, config)
        moments = PagedOptimizerState(adapter_shard_numels(model), config.optim, config.paging, torch.device("cpu"))
        load_weights(model, folder, torch.device("cpu"), 0, meshes.base_replicas)
        shape = config.train.micro_batch, config.data.seq_len
        window = [
            Batch(torch.randint(3, 300, shape), torch.randint(3, 300, shape), torch.arange(shape[1]).expand(shape))
            for _ in range(config.train.global_batch // (shape[0] * ranks.world_size))
        ]
        memory, _ = record_peaks(model, moments, window, sizes.adapter_replicas, config, traffic, steps=2)
        moments.close()
        return model_static_bytes(model), memory.peaks, traffic.take()
