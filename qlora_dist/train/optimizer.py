"""The optimizer that the configuration names."""

from __future__ import annotations

from qlora_dist.optim.adamw import PagedAdamW
from qlora_dist.optim.adapter_shards import AdapterShards
from qlora_dist.parallel.deepspeed_optimizer import AdapterOptimizer, ZeroAdamW, ZeroOptimizerState
from qlora_dist.parallel.loaded_model import OptimizerState
from qlora_dist.runtime.device_memory import memory_budget_bytes
from qlora_dist.train.run_setup import RunSetup


def make_optimizer(shards: AdapterShards, states: OptimizerState, setup: RunSetup) -> AdapterOptimizer:
    """Return the optimizer of a rank's shards, which have values already."""
    config = setup.config.optim
    if isinstance(states, ZeroOptimizerState):
        return ZeroAdamW(shards.local, states, config)
    return PagedAdamW(
        shards.local,
        states,
        config,
        [config.lora_plus_ratio if is_b else 1.0 for is_b in shards.is_lora_b],
        lambda held: memory_budget_bytes(setup.device, held, setup.ranks.local_world_size),
    )
