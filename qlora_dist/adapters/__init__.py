"""LoRA on NF4Linear, through PEFT, so that what is trained here is a PEFT adapter."""

import qlora_dist.compat.bitsandbytes  # noqa: F401, before PEFT imports it
