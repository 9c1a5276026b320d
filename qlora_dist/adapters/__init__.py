"""LoRA on QuantizedLinear through PEFT, so that a trained adapter is a PEFT adapter."""
