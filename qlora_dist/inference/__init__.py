"""What a trained adapter answers: its held-out loss, the text that it writes, its scores on tasks."""
