"""Stand-ins for modules of a model on meta, with which its class can run without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module call another function. It must have no replacement already."""
    module.forward = forward  # torch looks the attribute up at each call
    try:
        yield
    finally:
        del module.forward


class DecoderOutput(tuple[torch.Tensor]):
    """Output of a decoder of any class: the last hidden state, and None for every other attribute."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None
