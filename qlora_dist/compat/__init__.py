"""Private APIs of torch, transformers, PEFT, bitsandbytes and DeepSpeed, one file per library."""
