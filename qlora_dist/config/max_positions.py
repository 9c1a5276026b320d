"""Number of positions that a model supports, from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_dist.errors import UserError

_LENGTH_KEYS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    *("max_sequence_length", "max_seq_length", "model_max_length"),
)
_UNLIMITED_MODEL_TYPES = (
    *("falcon_mamba", "jamba", "mamba", "mamba2", "mpt", "nemotron_h"),
    *("recurrent_gemma", "rwkv", "xlstm", "zamba"),
)
"""Model types without positions or without a limit, whatever their config.json says."""
_SCALED_ROPE_TYPES = ("linear", "dynamic", "ntk", "yarn")
"""Kinds of rope scaling for which `max_position_embeddings` is the length before scaling."""


def max_positions(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that a model supports, including rope scaling, from its config.json.

    None: config.json has no limit, or the model needs none (ALiBi, state spaces).
    """
    text_config = config.get("text_config")
    if isinstance(text_config, Mapping) and (length := max_positions(text_config)) is not None:
        return length
    if config.get("model_type") in _UNLIMITED_MODEL_TYPES or _has_no_limit(config):
        return None
    lengths = (config[name] for name in _LENGTH_KEYS if isinstance(config.get(name), int))
    length = next((length for length in lengths if length > 0), None)
    return None if length is None else max(length, _rope_scaled_length(config, length))


def check_seq_len(seq_len: int, config: Mapping[str, Any], model_name: str) -> None:
    """Refuse rows (`data.seq_len`) that are longer than the positions in the model's config.json."""
    limit = max_positions(config)
    if limit is not None and seq_len > limit:
        raise UserError(
            f"data.seq_len: {seq_len:,} is more than the {limit:,} positions of {model_name}; set data.seq_len to "
            f"{limit} or less, or use a model that was made for longer texts (rope scaling in config.json counts)"
        )


def _has_no_limit(config: Mapping[str, Any]) -> bool:
    attention = config.get("attn_config")
    in_attention = isinstance(attention, Mapping) and bool(attention.get("alibi"))
    return in_attention or bool(config.get("alibi")) or config.get("position_embedding_type") in ("alibi", "nope")


def _rope_scaled_length(config: Mapping[str, Any], length: int) -> int:
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    # Gemma 3's max_position_embeddings is the length after scaling
    if not isinstance(scaling, Mapping) or "gemma3" in str(config.get("model_type")):
        return length
    factor = scaling.get("factor")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in _SCALED_ROPE_TYPES or not isinstance(factor, int | float):
        return length
    original = scaling.get("original_max_position_embeddings")
    return int((original if isinstance(original, int) else length) * factor)
