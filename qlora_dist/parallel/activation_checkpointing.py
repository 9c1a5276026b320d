"""Activation checkpointing and compilation of the decoder layers, before an engine shards them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_dist.config.sections import TrainConfig
from qlora_dist.parallel.compile import compile_layer


def apply_ac_and_compile(layers: Sequence[nn.Module], config: TrainConfig) -> None:
    """Compile and checkpoint layers in place, according to `train.compile` and `train.checkpointing`.

    This must precede sharding. The engine's hooks are then outside, and a recomputed layer is not gathered again.
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
    """Keep only the layer's input for backward. `forward` is replaced, so parameters keep their names."""
    forward = layer.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    layer.forward = recomputed
