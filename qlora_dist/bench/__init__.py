"""Comparison of layouts of one model: their memory, traffic, time and losses."""
