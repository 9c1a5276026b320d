"""LoRA on NF4Linear, through PEFT, so that what is trained here is a PEFT adapter."""
