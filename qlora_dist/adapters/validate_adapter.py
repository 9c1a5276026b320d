"""Checks of an adapter's type and of its values."""

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
"""Features of PEFT that are not supported, by key of adapter_config.json."""
_INITS_THAT_CHANGE_BASE = ("pissa", "olora", "corda", "loftq")


def check_adapter_type(config: Mapping[str, Any], path: Path) -> None:
    """Check that an adapter is LoRA on an unchanged base, without unsupported features.

    Args:
        config: content of adapter_config.json.
        path: the adapter's folder, for messages.

    Raises:
        UserError: it is not.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: is an adapter of type {config.get('peft_type')}, not LORA; use it with PEFT")
    for key, feature in _UNSUPPORTED_KEYS.items():
        if config.get(key):
            raise UserError(f"{path}: has {feature} ({key}), which is not supported; load it with PEFT")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_INITS_THAT_CHANGE_BASE):
        raise UserError(
            f"{path}: was initialized by {init}, which changed the base's weights too; save it with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )


def find_invalid_values(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return what is wrong with an adapter's tensors, given by PEFT's names; None if nothing is.

    Values must be finite. If every B is zero, as before training, the adapter changes nothing.
    """
    has_b = changes = False
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{name} holds values that are not finite"
        if ".lora_B." in name:
            has_b, changes = True, changes or bool(tensor.any())
    return "every B is zero, so it changes nothing" if has_b and not changes else None
