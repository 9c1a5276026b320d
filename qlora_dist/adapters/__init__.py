"""LoRA on NF4Linear through PEFT, so that a trained adapter is a PEFT adapter."""

import qlora_dist.compat.bitsandbytes  # noqa: F401, must precede PEFT's own import
