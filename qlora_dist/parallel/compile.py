"""torch.compile of the decoder layers."""

from __future__ import annotations

import torch
from torch import nn

from qlora_dist.compat.torch import has_cpp_compiler
from qlora_dist.errors import UserError


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile can work here, before a model is loaded.

    Raises:
        UserError: there is no C++ compiler.
    """
    if device.type == "cpu" and not has_cpp_compiler():  # on a GPU, Triton brings its own compiler
        raise UserError(
            "train.compile: this machine has no C++ compiler; install g++, name one in CXX, or set train.compile=false"
        )


def compile_layer(layer: nn.Module) -> None:
    """Compile a layer's forward in place.

    This must precede checkpointing and sharding, whose hooks are then outside the graph. All layers share one graph,
    because they have one class and their parameters are inputs. Matrix multiplications of 4-bit weights and attention
    on the CPU are custom operators, one node each. So neither the engine nor the sequences' lengths are traced.
    """
    layer.forward = torch.compile(layer.forward)
