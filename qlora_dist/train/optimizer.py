"""The optimizer that the configuration names."""

from __future__ import annotations

from torch import nn

from qlora_dist.optim.adamw import PagedAdamW
from qlora_dist.optim.optimizer_state import Moments
from qlora_dist.parallel.deepspeed_optimizer import Optimizer, ZeroAdamW, ZeroStates
from qlora_dist.runtime.device_memory import left_bytes
from qlora_dist.train.run_setup import Setup
from qlora_dist.train.train_step import AdapterShards, shard_sizes


def make_states(model: nn.Module, setup: Setup) -> Moments | ZeroStates:
    """Take the room for the moments of a sharded model, before its weights are read.

    Raises:
        UserError: there is not enough of it.
    """
    config = setup.config
    if config.optim.name == "zero-adamw":
        return ZeroStates(model, config.optim, config.paging, setup.device)
    return Moments(shard_sizes(model), config.optim, config.paging, setup.device)


def make_optimizer(shards: AdapterShards, states: Moments | ZeroStates, setup: Setup) -> Optimizer:
    """The optimizer of a rank's shards, which have values."""
    config = setup.config.optim
    if isinstance(states, ZeroStates):
        return ZeroAdamW(shards.local, states, config)
    return PagedAdamW(
        shards.local,
        states,
        config,
        [config.lora_plus_ratio if is_b else 1.0 for is_b in shards.is_lora_b],
        lambda held: left_bytes(setup.device, held, setup.ranks.local_world_size),
    )
