"""Memory, traffic and time of a configuration, without a GPU. Only the trace and the calibration import torch."""
