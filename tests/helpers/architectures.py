"""Tiny models of many architectures, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from qlora_dist.io.safetensors_file import SafetensorsReader
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantizable import quantizable_parameters, source_matrices
from qlora_dist.model.weight_sources import find_weight_sources
from qlora_dist.nf4.quantize import dequantize_weight
from tests.helpers.tiny_models import make_tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_MLA = {
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 24},
    # a special query scale, a window in every other layer, caps on attention and logits, a scaled embedding
    "Gemma2": {
        "head_dim": 16,
        "sliding_window": 24,
        "tie_word_embeddings": True,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 5.0,
    },
    "Phi3": {"original_max_position_embeddings": 512},
    "GPTNeoX": {"use_parallel_residual": True},
    "GPT2": {
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "OPT": {"ffn_dim": 160, "word_embed_proj_dim": 48, "tie_word_embeddings": True, "dropout": 0.0},
    "Falcon": {"parallel_attn": True, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 160},
    "Mixtral": {**_MOE},
    "Qwen3Moe": {
        "num_experts_per_tok": 2,
        "num_experts": 4,
        "moe_intermediate_size": 96,
        "head_dim": 16,
        "mlp_only_layers": [1],
    },
    "DeepseekV3": {
        **_MLA,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 96,
        "first_k_dense_replace": 1,
    },
    "Granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "Cohere": {"logit_scale": 0.5, "tie_word_embeddings": True},
    "Bloom": {"n_layer": 3, "n_head": 4, "tie_word_embeddings": True},  # ALiBi, and no position_ids
    "GptOss": {**_MOE, "head_dim": 16, "sliding_window": 24},
    "Qwen2Moe": {
        "num_experts_per_tok": 2,
        "num_experts": 4,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 96,
    },
    "Llama4": {
        **_MOE,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 160,
        "head_dim": 16,
        "attention_chunk_size": 512,
    },
}
"""Settings by the name that transformers' classes begin with, on top of the common ones."""

REQUIRED = list(ARCHITECTURES)[:13]


SETTINGS_OF_ALL = {
    **_COMMON,
    **_MOE,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 96,
    "head_dim": 16,
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 4,
}
"""Settings for a small model of nearly any `model_type`. A configuration ignores unknown settings."""


def make_architecture(folder: Path, name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Save a model of an architecture with transformers, and a tokenizer, and return the folder."""
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Llama4" else f"{name}Config")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config_class(**(_COMMON | ARCHITECTURES.get(name, {}) | settings))
    )
    with torch.no_grad():
        for parameter_name, tensor in model.state_dict().items():
            # the default values are so small that attention, experts and biases have no effect
            if tensor.dim() > 1 or parameter_name.endswith(("bias", "sinks")):
                tensor.normal_(std=0.15 if tensor.dim() > 1 else 0.5)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def dequantized_model(source: Path, quantized: Path, *, embeddings: bool = False) -> transformers.PreTrainedModel:
    """Return transformers' own model of a 16-bit folder with the dequantized weights of a 4-bit folder.

    With `embeddings`, embedding and head are dequantized too.
    """
    config = transformers.AutoConfig.from_pretrained(source)
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation=attention
    )
    folder = ModelFolder(quantized)
    origins = find_weight_sources(model, [*folder.entries, *folder.quantized])
    with SafetensorsReader() as reader, torch.no_grad():
        for target in quantizable_parameters(model, embeddings=embeddings):
            weights = []
            for matrix in source_matrices(target, origins, folder):
                entry = folder.quantized[matrix.name]
                packed = torch.empty(entry.layout.total_bytes, dtype=torch.uint8)
                entry.read_range(reader, packed, 0)
                weights.append(dequantize_weight(packed, entry.layout, torch.float32))
            if target.experts:
                per_expert = len(weights) // target.experts
                stacked = [torch.cat(weights[i * per_expert : (i + 1) * per_expert]) for i in range(target.experts)]
                whole = torch.stack([w.T for w in stacked] if target.transposed else stacked)
            else:
                whole = weights[0].T if target.transposed else weights[0]
            model.get_parameter(target.name).copy_(whole)
    return model
