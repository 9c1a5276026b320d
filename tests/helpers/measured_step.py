"""Bytes that a real rank holds and receives in steps on a CPU, counted as `trace/trace_step.py` counts them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qlora_dist.config.schema import Config
from qlora_dist.data.collate import Batch
from qlora_dist.parallel.loaded_model import load_trainable_model, shard_model
from qlora_dist.parallel.static_bytes import model_static_bytes
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.trace.live_memory import LayerPhase
from qlora_dist.trace.trace_step import record_peaks
from qlora_dist.train.run_setup import set_up_model


def gathered_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of ZeRO-3's parameters that are gathered at this moment."""
    return sum(parameter.untyped_storage().nbytes() for parameter in parameters)


def measure_step(config: Config) -> tuple[int, dict[LayerPhase, int], dict[str, int]]:
    """Run real steps, and return a rank's bytes of weights, its peaks by phase, and the bytes that it received."""
    ranks = read_rank_info()
    folder, model, _ = set_up_model(config)
    with process_group(ranks, torch.device("cpu")):
        loaded = load_trainable_model(shard_model(model, config, ranks, torch.device("cpu")), folder)
        shape = config.train.micro_batch, config.data.seq_len
        window = [
            Batch(torch.randint(3, 300, shape), torch.randint(3, 300, shape), torch.arange(shape[1]).expand(shape))
            for _ in range(config.train.global_batch // (shape[0] * ranks.world_size))
        ]
        replicas = loaded.meshes.sizes.adapter_replicas
        memory, _ = record_peaks(model, loaded.optimizer_state, window, replicas, config, loaded.traffic, steps=2)
        loaded.optimizer_state.close()
        return model_static_bytes(model), memory.peaks, loaded.traffic.take()
