"""The folder of a run: its files, its lock, its metrics, and what a command does in it."""
