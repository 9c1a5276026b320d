"""Weights in published formats among a folder's tensors, as `quantization_config` in config.json describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.io.safetensors_file import TensorEntry


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """Weights of a folder that are in a published format."""

    weights: Mapping[str, PublishedWeightEntry] = field(default_factory=dict)
    """Weights by name, as a 16-bit folder has them: `....weight`, or TENSOR.3.weight for expert 3 of a stacked
    TENSOR."""
    tensors: frozenset[str] = frozenset()
    """Names of all tensors that belong to these weights, or that only the format needs, such as scales of inputs."""


def find_published_weights(
    entries: Mapping[str, TensorEntry], quantization_config: Mapping[str, Any]
) -> PublishedWeights:
    """Find the weights in a published format.

    Raises:
        UserError: the format is not supported, or tensors of a weight are missing or have other shapes.
    """
    raise NotImplementedError
