"""Merging of a trained adapter into a model's weights, and of several adapters into one, from file to file."""
