"""Folder of a run: its files, its lock, its metrics, and the action of a command in it."""
