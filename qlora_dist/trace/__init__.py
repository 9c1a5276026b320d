"""The planner's tool for developers: a training step run on fake tensors, and measured speeds."""
