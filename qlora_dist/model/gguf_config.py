"""config.json of a model from the metadata of its GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_dist.errors import UserError
from qlora_dist.io.gguf_file import GGUF_FLOATS, GgufHeader
from qlora_dist.io.safetensors_file import SafetensorsReader
from qlora_dist.model.gguf_architectures import GGUF_ARCHITECTURES, ROPE_FACTORS, GgufArchitecture

CONFIG_REMEDY = "put the file into a folder with the config.json of the maker, and give that folder"

_COMMON_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_READ_ELSEWHERE = {*_HEAD_SIZES, "vocab_size", "rope.freq_base"}
_ROPE_SCALING_KEYS = ("type", "factor", "original_context_length", "finetuned")
_SPECIAL_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Values of all models by Meta from Llama 3.1 on. A file holds only the factors that follow from them."""


def find_architecture(header: GgufHeader, path: Path) -> GgufArchitecture:
    """Return the architecture of a file.

    Raises:
        UserError: it is not supported.
    """
    name = header.metadata.get("general.architecture")
    if name not in GGUF_ARCHITECTURES:
        supported = ", ".join(GGUF_ARCHITECTURES)
        raise UserError(
            f"{path}: has the architecture {name}, but of GGUF files only {supported} are supported; give the model in "
            "another format"
        )
    return GGUF_ARCHITECTURES[name]


def make_gguf_config(header: GgufHeader, path: Path) -> dict[str, Any]:
    """Return the content of config.json, as transformers makes it from the metadata.

    The size of heads and of experts, and the scaling of rotary frequencies, come from the metadata too. Here
    transformers uses the defaults of its class.

    Raises:
        UserError: the architecture is not supported, or the metadata lacks a value or has one that is not known.
    """
    architecture = find_architecture(header, path)
    prefix = f"{header.metadata['general.architecture']}."
    values = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    keys = {**_COMMON_KEYS, **architecture.metadata_keys}
    values.setdefault("attention.head_count_kv", values.get("attention.head_count"))
    if architecture.metadata_keys:
        values.setdefault("feed_forward_length", 0)  # the width of dense layers, of which there are none
    _check_values(values, keys, path, prefix)
    config: dict[str, Any] = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    config |= {name: _exact(values[key]) for key, name in keys.items()}
    config |= architecture.settings
    config["head_dim"] = next(
        (values[key] for key in _HEAD_SIZES if key in values), config["hidden_size"] // config["num_attention_heads"]
    )
    for key in _HEAD_SIZES:
        if values.get(key, config["head_dim"]) != config["head_dim"]:
            raise _unknown_value_error(path, f"{prefix}{key}", values[key])
    config["rope_parameters"] = _rope_parameters(header, values, config["head_dim"], path, prefix)
    config |= {name: header.metadata.get(f"tokenizer.ggml.{key}") for key, name in _SPECIAL_TOKENS.items()}
    if "token_embd.weight" not in header.tensors:
        raise UserError(f"{path}: holds no token_embd.weight; get the file anew")
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["dtype"] = gguf_dtype(header)
    return config


def gguf_dtype(header: GgufHeader) -> str:
    """Return the type of a model's values: its tensors' type in 16 or 32 bit, or bfloat16 if some are blocks."""
    types = {tensor.ggml_type for tensor in header.tensors.values()}
    name = next(name for name in ("BF16", "F16", "F32") if name in types) if types <= GGUF_FLOATS.keys() else "BF16"
    return str(GGUF_FLOATS[name]).removeprefix("torch.")


def _check_values(values: Mapping[str, Any], keys: Mapping[str, str], path: Path, prefix: str) -> None:
    for key in keys:
        if not isinstance(values.get(key), int | float):
            raise UserError(f"{path}: its metadata has no number as {prefix}{key}; {CONFIG_REMEDY}")
    known = {*keys, *_READ_ELSEWHERE, *(f"rope.scaling.{key}" for key in _ROPE_SCALING_KEYS)}
    for key, value in values.items():
        if key not in known and value not in (0, "", None):  # these switch a feature off
            raise _unknown_value_error(path, f"{prefix}{key}", value)


def _unknown_value_error(path: Path, key: str, value: Any) -> UserError:
    return UserError(f"{path}: its metadata has {key} = {value}, which is not supported; {CONFIG_REMEDY}")


def _exact(value: Any) -> Any:
    """Return the shortest number that is stored as this float32: 1e-06 and not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_parameters(
    header: GgufHeader, values: Mapping[str, Any], head_dim: int, path: Path, prefix: str
) -> dict[str, Any]:
    theta = _exact(values.get("rope.freq_base", 10_000.0))
    kind = values.get("rope.scaling.type", "none")
    factors = _rope_factors(header)
    if factors is not None:
        parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": round(factors.max().item(), 3),
            **_LLAMA3_ROPE,
        }
        if kind != "none" or not torch.allclose(factors, llama3_factors(parameters, head_dim), rtol=1e-5):
            raise UserError(f"{path}: {ROPE_FACTORS} has other factors than Llama 3.1 and 3.2; {CONFIG_REMEDY}")
        return parameters
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn") or "rope.scaling.factor" not in values:
        raise _unknown_value_error(path, f"{prefix}rope.scaling.type", kind)
    parameters = {"rope_type": kind, "rope_theta": theta, "factor": _exact(values["rope.scaling.factor"])}
    if kind == "yarn":
        length = values.get("rope.scaling.original_context_length")
        parameters["original_max_position_embeddings"] = length or values["context_length"]
    return parameters


def _rope_factors(header: GgufHeader) -> torch.Tensor | None:
    if ROPE_FACTORS not in header.tensors:
        return None
    with SafetensorsReader() as reader:
        factors: torch.Tensor = reader.read(header.tensors[ROPE_FACTORS].entry)
    return factors.to(torch.float32)


def llama3_factors(parameters: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Return by how much `llama3` divides each rotary frequency, float32[head_dim / 2].

    Source: `_compute_llama3_parameters` in `transformers.modeling_rope_utils`.
    """
    frequencies = parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    rotations = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high, factor = parameters["low_freq_factor"], parameters["high_freq_factor"], parameters["factor"]
    smooth = ((rotations - low) / (high - low)).clamp(0, 1)
    divisors: torch.Tensor = 1 / ((1 - smooth) / factor + smooth)
    return divisors.float()
