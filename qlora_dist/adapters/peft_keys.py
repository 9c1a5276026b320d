"""PEFT's names of an adapter's tensors in its file."""

from __future__ import annotations

import re

from qlora_dist.adapters.attach import ADAPTER_NAME
from qlora_dist.io.adapter_files import PEFT_PREFIX


def peft_key(name: str, adapter: str = ADAPTER_NAME) -> str:
    """Return the key of a parameter in PEFT's file.

    It has neither the adapter's name nor `.weight` after a magnitude vector. PEFT wraps an experts module once per
    adapted parameter, input projections first, so their keys contain `base_layer`.
    """
    name = name.replace(f"lora_magnitude_vector.{adapter}.weight", "lora_magnitude_vector")
    name = name.replace(f".{adapter}.", ".")
    name = re.sub(r"\.experts\.(gate_)?up_proj\.lora_", ".experts.base_layer.lora_", name)
    name = re.sub(r"\.experts\.down_proj\.lora_", ".experts.lora_", name)
    return PEFT_PREFIX + name


def parameter_name(key: str) -> str:
    """Return the name in the model of a fully trained parameter: a bias, or one in PEFT's wrapper of a module."""
    return key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
