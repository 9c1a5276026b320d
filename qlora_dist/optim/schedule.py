"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from qlora_dist.config.sections import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Return the learning rate of a step, counted from 0, of a run of `steps` steps.

    It rises linearly during the warm-up, whose last step has `config.lr`. Then it is constant, or falls linearly or as
    half a cosine. The step after the last would have zero. A warm-up longer than the run is cut to the run's steps.
    """
    warmup_steps = min(config.warmup_steps, steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr
