"""Reading and writing of files: byte ranges of safetensors, read-ahead, files of an adapter."""
