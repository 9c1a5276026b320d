"""Tiny configurations of every model type of transformers' causal and image-text-to-text classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from tests.helpers.tiny_multimodal import MULTIMODAL_OVERRIDES
from tests.helpers.tiny_overrides import OVERRIDES

VOCAB_SIZE = 320

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # the names that GPT-2 and others of its age have for the same sizes
    "n_layer": 3,
    "n_embd": 64,
    "n_head": 4,
    "n_inner": 192,
    "rotary_dim": 8,
    "d_model": 64,
    "n_layers": 3,
    "n_heads": 4,
    "d_ff": 192,
    "ffn_dim": 192,
    # experts
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_layer_start_index": 1,
    # latent attention and its indexer
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_head_dim": 24,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 512,
    # state space and linear attention
    "mamba_d_state": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "state_size": 16,
    "expand": 2,
    "num_heads": 4,
    "n_groups": 1,
    "chunk_size": 64,
    "mamba_chunk_size": 64,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "mamba_dt_rank": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "lru_width": 64,
    # dropout would make the losses of two implementations differ
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "residual_dropout": 0.0,
    "attn_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "max_window_layers": 3,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
}

_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
    "attention_heads": 2,
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 16,
    "in_channels": 3,
    "in_chans": 3,
    "projection_dim": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "output_dim": 64,
    "n_window": 4,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCAB_SIZE,
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return a configuration of a few hundred thousand parameters. Values that no setting names are the defaults."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_settings(config_class, _TEXT, {**OVERRIDES, **MULTIMODAL_OVERRIDES}.get(model_type, {})))


def _settings(
    config_class: type[PretrainedConfig], table: dict[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    known = _setting_names(config_class)
    settings = {name: value for name, value in table.items() if name in known}
    for alias, name in config_class.attribute_map.items():
        if alias in settings and name in settings:
            del settings[alias]
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    overrides = dict(overrides)
    for name, spec in config_class.sub_configs_defaults.items():
        own = overrides.pop(name, {})
        if own is not None:
            kind = own.get("model_type") or spec.model_type
            sub_class = CONFIG_MAPPING[kind] if spec.config_class is AutoConfig else spec.config_class
            own = _settings(sub_class, _TEXT if _is_text(name) else _TOWER, own)
            settings[name] = own | ({"model_type": kind} if spec.config_class is AutoConfig else {})
        else:
            settings[name] = None
    return settings | overrides


def _setting_names(config_class: type[PretrainedConfig]) -> set[str]:
    names = set(config_class.attribute_map)
    for parent in config_class.__mro__:
        names |= set(getattr(parent, "__annotations__", {}))
        if parent is not object:
            names |= set(inspect.signature(parent.__init__).parameters)
    return names


def _is_text(name: str) -> bool:
    return any(word in name for word in ("text", "language", "llm", "decoder", "thinker"))
