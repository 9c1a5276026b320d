"""Checks of the planner: a training step on fake tensors, and measured speeds."""
