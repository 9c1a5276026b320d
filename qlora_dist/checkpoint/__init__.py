"""What a run needs to go on: written beside the training, read by any number of ranks. Knows nothing of the loop."""
