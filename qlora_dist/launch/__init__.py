"""Launchers: the environment that they leave to ranks, how ranks end, SLURM jobs, and what lists and cancels runs."""
