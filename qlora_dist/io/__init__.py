"""Reading and writing of files: byte ranges of safetensors, reading ahead, the files of an adapter."""
