"""Weights in FP8 and NVFP4 as NVIDIA's ModelOpt writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.folder_tensors import PublishedWeights, require_tensor
from qlora_dist.formats.fp8 import FP8_DTYPES, INPUT_SCALES, make_fp8
from qlora_dist.formats.nvfp4 import make_nvfp4
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.io.safetensors_file import TensorEntry

_ALGORITHMS = ("FP8", "NVFP4", "MIXED_PRECISION")


def find_modelopt_weights(
    entries: Mapping[str, TensorEntry], config: Mapping[str, Any], dtype: str
) -> PublishedWeights:
    """Find the weights in FP8 and NVFP4. `config` gives `quant_algo`.

    Raises:
        UserError: the algorithm is another, or tensors of a weight are missing or have other types or shapes.
    """
    algorithm = config.get("quant_algo")
    if algorithm not in _ALGORITHMS:
        folder = next(iter(entries.values())).path.parent
        raise UserError(
            f"{folder}: is quantized by ModelOpt with {algorithm}, which is not supported; give a copy of the model in "
            "16 bit"
        )
    weights: dict[str, PublishedWeightEntry] = {}
    tensors = {name for name in entries if name.endswith(INPUT_SCALES)}
    for name, entry in entries.items():
        if not name.endswith(".weight") or entry.dtype not in (*FP8_DTYPES, torch.uint8):
            continue
        scale_name = f"{name}_scale"
        scale = require_tensor(entries, scale_name, name)
        tensors |= {name, scale_name}
        if entry.dtype == torch.uint8:
            whole = require_tensor(entries, f"{name}_scale_2", name)
            tensors.add(f"{name}_scale_2")
            weights[name] = make_nvfp4(name, (entry, scale, whole), dtype, is_modelopt=True)
        else:
            weights |= make_fp8(name, entry, scale_name, scale, None, dtype)
    return PublishedWeights(weights=weights, tensors=frozenset(tensors))
