"""Tensors that a device cannot hold all at once, moved in and out by pages. Knows nothing of ranks or models."""
