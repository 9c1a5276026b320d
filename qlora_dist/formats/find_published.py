"""Weights in published formats among a folder's tensors, as `quantization_config` in config.json describes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qlora_dist.errors import UserError
from qlora_dist.formats.awq import find_awq_weights
from qlora_dist.formats.bnb_int8 import find_bnb_int8_weights
from qlora_dist.formats.compressed_floats import find_compressed_floats
from qlora_dist.formats.compressed_integers import find_compressed_integers
from qlora_dist.formats.folder_tensors import PublishedWeights
from qlora_dist.formats.fp8 import find_fp8_weights
from qlora_dist.formats.gptq import find_gptq_weights
from qlora_dist.formats.modelopt import find_modelopt_weights
from qlora_dist.formats.mxfp4 import find_mxfp4_weights
from qlora_dist.io.safetensors_file import TensorEntry

_LEFT_OVER = (
    "weight_packed",
    "weight_scale",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    ".bitmask",
    ".pre_quant_scale",
)
"""Ends of the names of tensors that belong to a quantized weight, or to a sparse one."""


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
    if not isinstance(quantization_config, Mapping):
        raise _damaged_config_error(entries, "quantization_config is no JSON object")
    method = str(quantization_config.get("quant_method"))
    finder = _FINDERS.get(method)
    if finder is None:
        raise _unsupported_error(entries, f"is quantized with {method}")
    return finder(entries, quantization_config, dtype)


def _find_compressed(entries: Mapping[str, TensorEntry], config: Mapping[str, Any], dtype: str) -> PublishedWeights:
    """Find the weights of compressed-tensors. Groups of one folder may have several formats."""
    transforms = config.get("transform_config") or {}
    if not isinstance(transforms, Mapping):
        raise _damaged_config_error(entries, "quantization_config.transform_config is no JSON object")
    if transforms.get("config_groups"):
        raise _unsupported_error(entries, "is quantized with compressed-tensors after a rotation of its weights")
    integers = find_compressed_integers(entries, config, dtype)
    floats = find_compressed_floats(entries, config, dtype)
    found = PublishedWeights(weights={**integers.weights, **floats.weights}, tensors=integers.tensors | floats.tensors)
    return _check_complete(entries, found)


def _find_modelopt(entries: Mapping[str, TensorEntry], config: Mapping[str, Any], dtype: str) -> PublishedWeights:
    return _check_complete(entries, find_modelopt_weights(entries, config, dtype))


def _find_bitsandbytes(entries: Mapping[str, TensorEntry], config: Mapping[str, Any], dtype: str) -> PublishedWeights:
    """Find the weights in 8 bit. The caller finds those in 4 bit."""
    found = find_bnb_int8_weights(entries, config, dtype)
    if not found.weights:
        raise _unsupported_error(entries, "is quantized with bitsandbytes, but has no weights in 4 or 8 bit of it")
    return found


def _check_complete(entries: Mapping[str, TensorEntry], found: PublishedWeights) -> PublishedWeights:
    """Raise if a tensor is left that belongs to a quantized weight, because the weight has an unknown layout."""
    for name, entry in entries.items():
        if name not in found.tensors and name.endswith(_LEFT_OVER):
            raise UserError(
                f"{entry.path}: {name} belongs to a weight in a layout that is not supported; give a copy of the model "
                "in 16 bit"
            )
    return found


def _unsupported_error(entries: Mapping[str, TensorEntry], what: str) -> UserError:
    folder = next(iter(entries.values())).path.parent
    return UserError(f"{folder}: {what}, which is not supported; give a copy of the model in 16 bit")


def _damaged_config_error(entries: Mapping[str, TensorEntry], what: str) -> UserError:
    return UserError(f"{next(iter(entries.values())).path.parent / 'config.json'}: {what}; get the file anew")


_FINDERS: dict[str, Callable[[Mapping[str, TensorEntry], Mapping[str, Any], str], PublishedWeights]] = {
    "awq": find_awq_weights,
    "bitsandbytes": _find_bitsandbytes,
    "compressed-tensors": _find_compressed,
    "fbgemm_fp8": find_fp8_weights,
    "fp8": find_fp8_weights,
    "gptq": find_gptq_weights,
    "modelopt": _find_modelopt,
    "mxfp4": find_mxfp4_weights,
    "mxfp8": find_fp8_weights,
}
"""Functions by quant_method. Their last argument is the type of the dequantized values."""
