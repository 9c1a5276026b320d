"""Tiny multimodal models with random weights, in the layout that transformers' own classes save."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_models import make_tokenizer

# all widths are multiples of the block size of 64, because bitsandbytes dequantizes others wrongly on some CPUs
_TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 16,
    "in_channels": 3,
}

MULTIMODAL: dict[str, dict[str, Any]] = {
    # a window in all layers but some, an embedding that is scaled, a head that is tied
    "gemma3": {
        "text_config": {**_TEXT, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {**_VISION, "vision_use_head": False},
        "mm_tokens_per_image": 4,
    },
    # a causal language model as a part, experts, and a tower whose layers have the names of the text's
    "llama4": {
        "text_config": {
            **_TEXT,
            **_MOE,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 192,
            "attention_chunk_size": 512,
        },
        "vision_config": {
            **_VISION,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
    # a tower whose MLP has the names of the text's
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral", "tie_word_embeddings": False},
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 16},
        "tie_word_embeddings": False,
    },
    # three kinds of positions
    "qwen3_vl": {"text_config": {**_TEXT, **_ROPE}, "vision_config": _QWEN_VISION},
    # experts that transformers transposes on loading
    "qwen3_vl_moe": {"text_config": {**_TEXT, **_MOE, **_ROPE}, "vision_config": _QWEN_VISION},
    "qwen3_5": {"text_config": {**_TEXT, **_LINEAR}, "vision_config": _QWEN_VISION},
    "qwen3_5_moe": {"text_config": {**_TEXT, **_LINEAR, **_MOE}, "vision_config": _QWEN_VISION},
    # a parameter beside the towers, and a tower with the names of the text's attention
    "llava_next": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model"},
    },
}
"""Settings by `model_type`."""


def make_multimodal(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Save a multimodal model with transformers, and a tokenizer, and return the folder."""
    config = transformers.CONFIG_MAPPING[model_type](**(MULTIMODAL[model_type] | settings))
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # the default values are so small that attention, experts and biases have no effect
            if tensor.dim() > 1 and "conv1d" not in name:
                tensor.normal_(std=0.15)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def dequantized_multimodal(source: Path, quantized: Path, out: Path) -> transformers.PreTrainedModel:
    """Return transformers' own model in fp32 with what bitsandbytes makes of a 4-bit folder's weights.

    The 16-bit folder `source` gives names and shapes, and `out` is a folder to write.
    """
    packed = load_tensors(quantized)

    def dequantize(name: str) -> torch.Tensor:
        state = {key.removeprefix(f"{name}."): value for key, value in packed.items() if key.startswith(f"{name}.")}
        return bnb.dequantize_4bit(packed[name], bnb.QuantState.from_dict(state, torch.device("cpu"))).float()

    tensors = {}
    for name, tensor in load_tensors(source).items():
        if f"{name}.0.weight" in packed:
            experts = [dequantize(f"{name}.{index}.weight") for index in range(len(tensor))]
            whole = torch.stack(experts)
            tensors[name] = (whole if whole.shape == tensor.shape else whole.mT).contiguous()
        else:
            tensors[name] = dequantize(name) if f"{name}.absmax" in packed else tensor.float()
    out.mkdir()
    shutil.copy(source / "config.json", out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return open_multimodal(out)


def open_multimodal(folder: Path) -> transformers.PreTrainedModel:
    """Open a folder with transformers in fp32, and check that it has exactly the model's tensors."""
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()
