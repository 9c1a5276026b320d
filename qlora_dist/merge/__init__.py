"""What becomes of an adapter after training: merged into a model's weights, from file to file."""
