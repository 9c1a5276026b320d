"""A typical user's model with transformers, PEFT and bitsandbytes, for the scripts that need it."""

from __future__ import annotations

import peft
import torch
import transformers
from marks import MATERIAL
from safetensors.torch import load_file


def warm_up_imports(base: str) -> None:
    """Import the modules that loading imports, so that they do not count as the model's memory."""
    import bitsandbytes  # noqa: F401

    with torch.device("meta"):
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(base))


def peft_model(base: str) -> peft.PeftModel:
    """Load the 4-bit folder in bf16, and add adapters with PEFT's defaults (fp32) and the common initial values."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for parameter in model.parameters():  # read mapped weights now, not in the first step
        parameter.data.view(-1).view(torch.uint8)[::4096].sum()
    values = load_file(MATERIAL / "adapter.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[name.removeprefix("base_model.model.")])
    return model
