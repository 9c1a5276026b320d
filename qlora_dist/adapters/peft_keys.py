"""How PEFT names an adapter's tensors in its file."""

from __future__ import annotations

import re

from qlora_dist.adapters.attach import ADAPTER_NAME
from qlora_dist.io.adapter_files import PEFT_PREFIX


def peft_key(name: str, adapter: str = ADAPTER_NAME) -> str:
    """PEFT's name in a file: without the adapter's, and without `.weight` behind a magnitude vector.

    PEFT wraps an experts module once for each parameter that is adapted, the projections into the experts before those
    out of them: so the first are found under `base_layer`.
    """
    name = name.replace(f"lora_magnitude_vector.{adapter}.weight", "lora_magnitude_vector")
    name = name.replace(f".{adapter}.", ".")
    name = re.sub(r"\.experts\.(gate_)?up_proj\.lora_", ".experts.base_layer.lora_", name)
    name = re.sub(r"\.experts\.down_proj\.lora_", ".experts.lora_", name)
    return PEFT_PREFIX + name


def parameter_name(key: str) -> str:
    """The parameter's name in the model, of one that was trained whole: a bias, or a module that PEFT has wrapped."""
    return key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
