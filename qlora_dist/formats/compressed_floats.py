"""Weights of compressed-tensors in FP8, MXFP8, MXFP4 and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.compressed_scheme import CompressedScheme, CompressedSchemes
from qlora_dist.formats.folder_tensors import PublishedWeights, damaged_tensor_error, require_tensor
from qlora_dist.formats.fp8 import FP8_DTYPES, INPUT_SCALES, make_fp8
from qlora_dist.formats.mxfp4 import make_packed_mxfp4
from qlora_dist.formats.nvfp4 import make_nvfp4
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.io.safetensors_file import TensorEntry

_FP8_FORMATS = ("float-quantized", "naive-quantized", "mxfp8-quantized")
_IGNORED = (*INPUT_SCALES, ".input_global_scale", ".output_scale", ".q_scale")


def find_compressed_floats(
    entries: Mapping[str, TensorEntry], config: Mapping[str, Any], dtype: str
) -> PublishedWeights:
    """Find the weights of compressed-tensors in floating-point formats. Weights in integers are left out.

    Raises:
        UserError: a scheme is not supported, or tensors of a weight are missing or have other types or shapes.
    """
    schemes = CompressedSchemes(config, next(iter(entries.values())).path.parent / "config.json")
    weights: dict[str, PublishedWeightEntry] = {}
    tensors = {name for name in entries if name.endswith(_IGNORED)}
    for name, entry in entries.items():
        stem, _, kind = name.rpartition(".")
        if kind != "weight_packed" and not (kind == "weight" and entry.dtype in FP8_DTYPES):
            continue
        scheme = schemes.find(stem)
        if scheme is None:
            raise damaged_tensor_error(entry, name, "belongs to no group of quantization_config in config.json")
        if scheme.type != "float":
            continue
        if f"{stem}.weight_zero_point" in entries:
            raise _unsupported_error(entry, name, scheme, "with a zero point")
        found, used = _make_weights(entries, name, scheme, dtype)
        weights |= found
        tensors |= used
    return PublishedWeights(weights=weights, tensors=frozenset(tensors))


def _make_weights(
    entries: Mapping[str, TensorEntry], name: str, scheme: CompressedScheme, dtype: str
) -> tuple[dict[str, PublishedWeightEntry], set[str]]:
    """Return the weights whose codes are the tensor `name`, and the names of their tensors."""
    entry, stem = entries[name], name.rpartition(".")[0]
    scale_name, whole_name = f"{stem}.weight_scale", f"{stem}.weight_global_scale"
    scale = require_tensor(entries, scale_name, name)
    if scheme.format in _FP8_FORMATS and entry.dtype in FP8_DTYPES:
        block = (1, scheme.group_size) if scheme.strategy == "group" and scheme.group_size else scheme.block
        # compressed-tensors reads exponents in bytes as bf16
        product_dtype = torch.bfloat16 if scale.dtype == torch.uint8 else scale.dtype
        found = make_fp8(name, entry, scale_name, scale, block, dtype, product_dtype=product_dtype)
        return found, {name, scale_name}
    if scheme.format == "mxfp4-pack-quantized" and entry.dtype == torch.uint8:
        return make_packed_mxfp4(name, entry, scale_name, scale, dtype), {name, scale_name}
    if scheme.format == "nvfp4-pack-quantized" and entry.dtype == torch.uint8:
        whole = require_tensor(entries, whole_name, name)
        weight = make_nvfp4(name, (entry, scale, whole), dtype)
        return {f"{stem}.weight": weight}, {name, scale_name, whole_name}
    raise _unsupported_error(entry, name, scheme, f"as {str(entry.dtype).removeprefix('torch.')}")


def _unsupported_error(entry: TensorEntry, name: str, scheme: CompressedScheme, what: str) -> UserError:
    return UserError(
        f"{entry.path}: {name} is in the format '{scheme.format}' {what}, which is not supported; give a copy of the "
        "model in 16 bit"
    )
