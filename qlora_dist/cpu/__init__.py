"""Kernels for CPUs. Code that runs on a GPU does not import them."""
