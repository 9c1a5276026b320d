"""The optimizer that the configuration names."""

from __future__ import annotations

from torch import nn

from qlora_dist.optim.adamw import PagedAdamW
from qlora_dist.optim.optimizer_state import PagedOptimizerState
from qlora_dist.parallel.deepspeed_optimizer import AdapterOptimizer, ZeroAdamW, ZeroOptimizerState
from qlora_dist.runtime.device_memory import memory_budget_bytes
from qlora_dist.train.run_setup import RunSetup
from qlora_dist.train.train_step import AdapterShards, adapter_shard_numels


def make_optimizer_state(model: nn.Module, setup: RunSetup) -> PagedOptimizerState | ZeroOptimizerState:
    """Take the room for the moments of a sharded model, before its weights are read.

    Raises:
        UserError: there is not enough of it.
    """
    config = setup.config
    if config.optim.name == "zero-adamw":
        return ZeroOptimizerState(model, config.optim, config.paging, setup.device)
    return PagedOptimizerState(adapter_shard_numels(model), config.optim, config.paging, setup.device)


def make_optimizer(
    shards: AdapterShards, states: PagedOptimizerState | ZeroOptimizerState, setup: RunSetup
) -> AdapterOptimizer:
    """The optimizer of a rank's shards, which have values."""
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
