"""Weights in published formats among a folder's tensors, as `quantization_config` in config.json describes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qlora_dist.errors import UserError
from qlora_dist.formats.folder_tensors import PublishedWeights
from qlora_dist.formats.fp8 import find_fp8_weights
from qlora_dist.formats.mxfp4 import find_mxfp4_weights
from qlora_dist.io.safetensors_file import TensorEntry

_Finder = Callable[[Mapping[str, TensorEntry], Mapping[str, Any], str], PublishedWeights]

_FINDERS: dict[str, _Finder] = {
    "fbgemm_fp8": find_fp8_weights,
    "fp8": find_fp8_weights,
    "mxfp4": find_mxfp4_weights,
    "mxfp8": find_fp8_weights,
}
"""Functions by quant_method. Their last argument is the type of the dequantized values."""


def find_published_weights(
    entries: Mapping[str, TensorEntry], quantization_config: Mapping[str, Any], dtype: str = "bfloat16"
) -> PublishedWeights:
    """Find the weights in a published format.

    Args:
        entries: all tensors of a folder by name, at least one.
        quantization_config: the object of this name in config.json.
        dtype: type of the model ('bfloat16', 'float16', 'float32'), to which the dequantized values are rounded.

    Raises:
        UserError: the format is not supported, or tensors of a weight are missing or have other shapes.
    """
    method = str(quantization_config.get("quant_method"))
    finder = _FINDERS.get(method)
    if finder is None:
        folder = next(iter(entries.values())).path.parent
        raise UserError(
            f"{folder}: is quantized with {method}, which is not supported; give a copy of the model in 16 bit"
        )
    return finder(entries, quantization_config, dtype)
