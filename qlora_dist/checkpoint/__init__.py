"""Checkpoints of a run: written during training, and read by any number of ranks."""
