"""What happens to the decoder layers before an engine shards them: compiling, and activation checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_dist.config.sections import TrainConfig
from qlora_dist.parallel.compile import compile_layer


def apply_ac_and_compile(layers: Sequence[nn.Module], config: TrainConfig) -> None:
    """Compile and checkpoint layers in place, as `compile` and `checkpointing` say.

    Before sharding, so that the engine's hooks lie outside: a recomputed layer is not gathered a third time.
    """
    for index, layer in enumerate(layers):
        if config.compile:
            compile_layer(layer)
        if _is_checkpointed(index, config.checkpointing):
            _checkpoint_layer(layer)


def _is_checkpointed(index: int, setting: str | int) -> bool:
    if isinstance(setting, int):
        return index % setting == 0
    return setting == "full"


def _checkpoint_layer(layer: nn.Module) -> None:
    """Keep only the layer's input for backward. Replaces `forward`, so that parameters keep their names."""
    forward = layer.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    layer.forward = recomputed
