"""LoRA on NF4Linear through PEFT, so that a trained adapter is a PEFT adapter."""
