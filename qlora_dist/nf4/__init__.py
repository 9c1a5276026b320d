"""4-bit weights: bytes, arithmetic and files, on top of torch and bitsandbytes. Nothing here depends on ranks."""
