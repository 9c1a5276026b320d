"""Comparison of the planner's parameters with a model's."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from qlora_dist.plan.model_spec import ModelSpec


def compare_parameters(planned: ModelSpec, model: nn.Module) -> None:
    """Assert that the shapes, the trained and the quantized parameters are equal, in any order."""
    expected = Counter((p.shape, p.trained, p.is_quantized) for unit in planned.units for p in unit.parameters)
    actual = Counter((tuple(p.shape), p.requires_grad, p.dtype == torch.uint8) for p in model.parameters())
    assert expected == actual
