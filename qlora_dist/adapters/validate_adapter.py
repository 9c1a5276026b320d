"""Whether an adapter is of a kind that is known here, and its values are worth keeping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_dist.errors import UserError

_UNSUPPORTED_KEYS = {
    "trainable_token_indices": "trained rows of an embedding",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "lora_bias": "a bias of B",
}
"""What PEFT can do besides, by key of adapter_config.json."""
_INITS_THAT_CHANGE_BASE = ("pissa", "olora", "corda", "loftq")


def check_adapter_type(config: Mapping[str, Any], path: Path) -> None:
    """See whether an adapter is LoRA on the base as it is, and no more than is known here.

    Args:
        config: adapter_config.json.
        path: of its folder.

    Raises:
        UserError: it is not.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: is an adapter of type {config.get('peft_type')}, not LORA; use it with PEFT")
    for key, feature in _UNSUPPORTED_KEYS.items():
        if config.get(key):
            raise UserError(
                f"{path}: has {feature} ({key}), which is not known here; load it with PEFT beside the base"
            )
    first = config.get("init_lora_weights", True)
    if isinstance(first, str) and first.startswith(_INITS_THAT_CHANGE_BASE):
        raise UserError(
            f"{path}: began from {first}, which changed the base's weights too; save it with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )


def find_invalid_values(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
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
