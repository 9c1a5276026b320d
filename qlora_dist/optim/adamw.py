"""AdamW on local shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from qlora_dist.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""First and second, fp32, of a shard's shape each."""


def build_optimizer(shards: Iterable[torch.nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Torch's fused AdamW over this rank's shards.

    Args:
        shards: fp32, plain tensors. The update of AdamW is element-wise, so a shard needs nothing of its parameter's
            rest, and its moments are as sharded as it is.
        config: the section `optim`. The learning rate is set before each step (`learning_rate`).
    """
    return torch.optim.AdamW(
        list(shards),  # empty ones too, which have no gradient and are passed over: torch refuses an empty list
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the moments that this rank holds."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def moments(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """The moments of a shard, by name; zeros before the first update."""
    state = optimizer.state.get(parameter, {})
    return {name: state.get(name, torch.zeros_like(parameter)) for name in MOMENTS}


def load_moments(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, values: Mapping[str, torch.Tensor], steps: int
) -> None:
    """Set the moments of a shard, and the number of updates that made them, which corrects their bias."""
    if steps == 0:
        optimizer.state.pop(parameter, None)
        return
    state = {name: values[name].to(parameter.device) for name in MOMENTS}
    # fused AdamW keeps the number with the shard, as fp32
    state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)
    optimizer.state[parameter] = state
