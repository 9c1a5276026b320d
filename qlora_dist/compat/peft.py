"""PEFT 0.21, and its private names. The package imports PEFT from this file only.

PEFT imports bitsandbytes, which loads torch's compiler unless `compat/bitsandbytes.py` imports it first.
"""

from __future__ import annotations

from typing import Any

# isort: off
import qlora_dist.compat.bitsandbytes  # noqa: F401, before PEFT imports it

import peft as peft
from peft.tuners.lora.layer import LoraLayer as LoraLayer
from peft.tuners.lora.layer import LoraVariant as LoraVariant
from peft.tuners.lora.layer import dispatch_default as dispatch_default
from peft.tuners.tuners_utils import check_target_module_exists as check_target_module_exists
from peft.utils import merge_utils as merge_utils
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers as convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers as convert_peft_config_for_transformers,
)

# isort: on

PEFT_PRIVATE_NAMES = ("peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters",)


def enable_frozen_adapters(module: Any) -> None:
    """Enable a layer's adapters. `enable_adapters(True)` would make them trainable as well."""
    module._disable_adapters = False
