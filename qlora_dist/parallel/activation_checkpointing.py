"""Activation checkpointing and compilation of the decoder layers, before an engine shards them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_dist.compat.torch import has_cpp_compiler
from qlora_dist.config.sections import TrainConfig
from qlora_dist.errors import UserError


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile can work here, before a model is loaded."""
    if device.type == "cpu" and not has_cpp_compiler():  # on a GPU, Triton brings its own compiler
        raise UserError(
            "train.compile: this machine has no C++ compiler; install g++, name one in CXX, or set train.compile=false"
        )


def apply_ac_and_compile(layers: Sequence[nn.Module], config: TrainConfig) -> None:
    """Compile and checkpoint layers in place, according to `train.compile` and `train.checkpointing`.

    This must precede sharding. The engine's hooks are then outside, and a recomputed layer is not gathered again.
    All layers share one compiled graph, because they have one class and their parameters are inputs. Matrix
    multiplications of 4-bit weights and attention on the CPU are custom operators, one node each. So neither the engine
    nor the sequences' lengths are traced.
    """
    setting = config.checkpointing
    for index, layer in enumerate(layers):
        if config.compile:
            layer.forward = torch.compile(layer.forward)
        if setting == "full" or (isinstance(setting, int) and index % setting == 0):
            _checkpoint_layer(layer)


def _checkpoint_layer(layer: nn.Module) -> None:
    """Keep only the layer's input for backward. `forward` is replaced, so parameters keep their names."""
    forward = layer.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    layer.forward = recomputed
