"""Whether an adapter's values are worth keeping."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def wrong_values(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """What is wrong with an adapter's tensors, by PEFT's names; None: nothing.

    A value is not finite; or all B are zero, as they are before training: such an adapter changes nothing.
    """
    b_seen = changes = False
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{name} holds values that are not finite"
        if ".lora_B." in name:
            b_seen, changes = True, changes or bool(tensor.any())
    return "every B is zero, so it changes nothing" if b_seen and not changes else None
