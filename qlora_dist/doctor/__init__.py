"""Checks of one machine, or of all machines of a job, before a run starts."""
