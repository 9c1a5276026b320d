"""torch.compile of the decoder layers."""

from __future__ import annotations

import torch
from torch import nn

from qlora_dist.compat.torch import has_cpp_compiler
from qlora_dist.errors import UserError


def check_compiler(device: torch.device) -> None:
    """See whether torch.compile can work here, before a model is loaded.

    Raises:
        UserError: there is no C++ compiler.
    """
    if device.type == "cpu" and not has_cpp_compiler():  # for GPUs Triton brings its own
        raise UserError(
            "train.compile: this machine has no C++ compiler; install g++, name one in CXX, or set train.compile=false"
        )


def compile_layer(layer: nn.Module) -> None:
    """Compile a layer's forward, in place. Before checkpointing and sharding, whose hooks then lie outside the graph.

    All layers share one graph: they have one class, and what differs, their parameters, is input. The matrix
    multiplications of 4-bit weights and attention on the CPU are operators of ours, one node each: neither engine nor
    the lengths of packed sequences are traced.
    """
    layer.forward = torch.compile(layer.forward)
