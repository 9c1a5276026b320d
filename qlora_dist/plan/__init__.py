"""Estimates of a configuration's memory, traffic and time, without a GPU and without torch."""
