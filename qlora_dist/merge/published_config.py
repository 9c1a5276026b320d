"""Configuration of a merged folder in which some weights keep their published format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_EXCLUSION_KEYS = {"fp8": "modules_to_not_convert", "mxfp4": "modules_to_not_convert", "compressed-tensors": "ignore"}
"""Key of `quantization_config` that lists the modules in 16 bit, by `quant_method`."""


def find_exclusion_key(config: Mapping[str, Any]) -> str | None:
    """Return the key of `quantization_config` that lists modules in 16 bit; None if the format has none."""
    return _EXCLUSION_KEYS.get((config.get("quantization_config") or {}).get("quant_method", ""))


def exclude_modules(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Return `quantization_config` with further modules in 16 bit, given by their names in transformers' class."""
    quantization_config = dict(config["quantization_config"])
    key = _EXCLUSION_KEYS[quantization_config["quant_method"]]
    quantization_config[key] = sorted({*(quantization_config.get(key) or ()), *modules})
    return quantization_config
