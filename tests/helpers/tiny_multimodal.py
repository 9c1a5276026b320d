"""Settings of single image-text-to-text types, on top of those that fit nearly all."""

from __future__ import annotations

from typing import Any

from tests.helpers.tiny_overrides import DOTS3_NOTE, MULTIMODAL_ROPE, SMALL_WINDOW_HEADS

_IMAGE_VOCABULARY = {"<image>": 3, "<|extra_200|>": 4}

_SMALL_VQ = {"base_channels": 32, "channel_multiplier": [1, 1]}
_LINEAR = {"linear_head_dim": 16, "linear_num_heads": 4}

_TEXT_ROPE = {"text_config": {"rope_parameters": MULTIMODAL_ROPE}}

MULTIMODAL_OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga", "hunyuan_vl", "paddleocr_vl"), _TEXT_ROPE),
    **dict.fromkeys(("cosmos3_edge", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"), _TEXT_ROPE),
    "chameleon": {"vocabulary_map": _IMAGE_VOCABULARY, "vq_config": _SMALL_VQ},
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": MULTIMODAL_ROPE}}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]}},
    "dots3_note": {
        "text_config": DOTS3_NOTE,
        "vision_config": {
            "mlp_layer_types": ["dense", "dense"],
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
            "adapter_merge_size": 2,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64, "downsample_hidden_size": 32},
    },
    "emu3": {"vocabulary_map": _IMAGE_VOCABULARY, "vq_config": _SMALL_VQ},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [128, 128], "rope_parameters": MULTIMODAL_ROPE}},
    "florence2": {
        "vision_config": {"patch_size": [7, 3, 3, 3], "embed_dim": [16, 16, 32, 32], "num_heads": [2] * 4},
        "text_config": {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    },
    "glm5_next": {
        "text_config": {"qk_rope_head_dim": 0, **_LINEAR},
        "vision_config": {"projection_intermediate_size": 64},
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {**MULTIMODAL_ROPE, "mrope_section": [1, 1, 2]}}},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "inkling2": {"text_config": SMALL_WINDOW_HEADS, "vision_config": {"text_hidden_size": 64}},
    "inkling_mm_model": {"text_config": SMALL_WINDOW_HEADS},
    "janus": {"vq_config": _SMALL_VQ},
    "llama4": {
        "vision_config": {
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "intermediate_size": 128,
        }
    },
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": 64},
        "vision_config": {"image_size": [28, 28]},
    },
    "muse_glimmer": {"projector_hidden_size": 64, "out_hidden_size": 64},
    "muse_spark": {
        "projector_hidden_size": 64,
        "out_hidden_size": 64,
        "text_config": {"moe_hidden_size": 64},
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [16] * 4, "out_hidden_size": 64},
    },
    "step3p7": {"text_config": {"sliding_window": 24}},
    "nemotron_h_omni": {
        "audio_config": None,
        "projector_hidden_size": 64,
        "vision_hidden_size": 32,
        "vision_config": {"video_temporal_patch_size": 2},
    },
}
