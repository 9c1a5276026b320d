"""Kernels that make a CPU faster. Nothing on a path that a GPU takes imports them."""
