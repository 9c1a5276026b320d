"""Settings of single model types, on top of those that fit nearly all."""

from __future__ import annotations

from typing import Any

WITHOUT_CLASS = {
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "its class fails for every configuration"),
    **dict.fromkeys(("fast_vlm", "perception_lm"), "its vision tower needs the package timm"),
    "evolla": "the class of this task takes another configuration",
    "gemma3n": "its vision tower needs the package timm",
    "musicgen": "its class takes another configuration",
    "musicgen_melody": "its class takes another configuration",
}
"""Types of which transformers cannot build a model here, with the reason."""

_DECODER_OF_TWO = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 192,
    "decoder_ffn_dim": 192,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "is_decoder": True,
}

_BLT = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "vocab_size": 320,
}

_DECODER = {"is_decoder": True}
_FOUR_LAYERS = {"num_hidden_layers": 4}
SMALL_WINDOW_HEADS = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MULTIMODAL_ROPE = {**_ROPE, "mrope_section": [2, 3, 3]}

DOTS3_NOTE = {
    "num_key_value_heads": 4,
    "head_dim": 24,
    "shared_experts_intermediate_size": 128,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 48,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("bart", "bigbird_pegasus", "blenderbot", "marian", "mbart", "mvp", "pegasus", "plbart", "whisper"),
        _DECODER_OF_TWO,
    ),
    **dict.fromkeys(("bert", "roberta", "electra", "xlm-roberta"), _DECODER),
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_config": _BLT, "decoder_config": _BLT, "global_config": _BLT},
    "cohere_compass_text": {"rope_parameters": {"full_attention": MULTIMODAL_ROPE}},
    "cpmant": {"dim_ff": 192, "dim_head": 16, "prompt_types": 2, "prompt_length": 4, "segment_types": 4},
    "ctrl": {"dff": 192, "n_ctx": 512, "n_positions": 512},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        "max_seq_len": 512,
    },
    "dots3_note_text": DOTS3_NOTE,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gpt_neo": {
        "attention_types": [[["global", "local", "global"], 1]],
        "num_layers": 3,
        "attention_layers": ["global", "local", "global"],
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    **dict.fromkeys(("inkling_text", "inkling2_text"), SMALL_WINDOW_HEADS),
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {
        "head_dim": 8,
        "num_layers": 1,
        "ffn_hidden_size": 192,
        "expert_ffn_hidden_size": 128,
        "zero_expert_num": 2,
    },
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "expand": 2},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), _FOUR_LAYERS),
    "minimax": {"block_size": 32},
    "prophetnet": {"decoder_ffn_dim": 192, "num_decoder_layers": 2, "num_decoder_attention_heads": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [32, 32],
        "attention_head_size": 16,
        "feed_forward_size": 192,
    },
    "roc_bert": {
        "is_decoder": True,
        "shape_vocab_size": 50,
        "shape_embed_dim": 16,
        "pronunciation_vocab_size": 50,
        "pronunciation_embed_dim": 16,
    },
    "youtu": {"pad_token_id": None},  # transformers sets the padding token's row to zero on loading
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
