"""Architectures of GGUF files: names of their tensors in llama.cpp and in transformers, and their config.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_dist.errors import UserError
from qlora_dist.formats.folder_tensors import slice_expert
from qlora_dist.io.gguf_file import GgufTensor

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{kind}": f"self_attn.{kind}_proj" for kind in "qkv"},
    "attn_output": "self_attn.o_proj",
}
_HEAD_NORMS = {f"attn_{kind}_norm": f"self_attn.{kind}_norm" for kind in "qk"}
_MLP = {f"ffn_{kind}": f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}
_EXPERTS = {"ffn_gate_inp": "mlp.gate", **{f"{name}_exps": f"mlp.experts.*.{name[4:]}_proj" for name in _MLP}}
"""Names of a layer's tensors of all experts. An asterisk stands for the number of the expert."""
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"{name}_shexp": f"mlp.shared_expert.{name[4:]}_proj" for name in _MLP},
}
_LAYER_TENSOR = re.compile(r"blk\.(?P<layer>\d+)\.(?P<name>\w+)\.(?P<kind>weight|bias)")
_EXPERT_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """Architecture of a GGUF file (`general.architecture`) that transformers has too."""

    model_type: str
    class_name: str
    layer_names: Mapping[str, str]
    """Names of a layer's modules in llama.cpp and in transformers."""
    has_qkv_bias: bool = False
    interleaves_heads: bool = False
    """Whether llama.cpp interleaves the halves of each head in the projections of queries and keys."""
    metadata_keys: Mapping[str, str] = field(default_factory=dict)
    """Keys of the metadata, after the architecture's name, and of config.json, besides those that all have."""
    equal_types: tuple[str, ...] = ()
    """Other values of `model_type` whose tensors have the same names and meanings."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values in config.json that follow from the architecture."""


GGUF_ARCHITECTURES = {
    "llama": GgufArchitecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        layer_names=_ATTENTION | _MLP,
        interleaves_heads=True,
        equal_types=("mistral",),
    ),
    "qwen2": GgufArchitecture(
        model_type="qwen2", class_name="Qwen2ForCausalLM", layer_names=_ATTENTION | _MLP, has_qkv_bias=True
    ),
    "qwen2moe": GgufArchitecture(
        model_type="qwen2_moe",
        class_name="Qwen2MoeForCausalLM",
        layer_names=_ATTENTION | _EXPERTS | _SHARED_EXPERT,
        has_qkv_bias=True,
        metadata_keys={**_EXPERT_KEYS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    "qwen3": GgufArchitecture(
        model_type="qwen3", class_name="Qwen3ForCausalLM", layer_names=_ATTENTION | _HEAD_NORMS | _MLP
    ),
    "qwen3moe": GgufArchitecture(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        layer_names=_ATTENTION | _HEAD_NORMS | _EXPERTS,
        metadata_keys=_EXPERT_KEYS,
        settings={"norm_topk_prob": True},  # llama.cpp normalizes always, and the metadata does not say so
    ),
}
"""Architectures by their names in GGUF files. Mistral's files say llama."""

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of Llama 3.1 and later, which stands for `rope_scaling` in config.json."""


def named_tensors(
    architecture: GgufArchitecture, tensors: Mapping[str, GgufTensor]
) -> Iterator[tuple[str, GgufTensor, bool]]:
    """Yield transformers' name of each tensor, the tensor, and whether its rows are heads with interleaved halves.

    A tensor of all experts is sliced, and each expert's matrix has the name that a 16-bit folder has for it.

    Raises:
        UserError: transformers' class has no such tensor.
    """
    for gguf_name, tensor in tensors.items():
        if gguf_name == ROPE_FACTORS:
            continue
        name, gguf_module = _transformers_name(architecture, gguf_name, tensor)
        interleaved = architecture.interleaves_heads and gguf_module in ("attn_q", "attn_k")
        if "*" in name:
            before, _, after = name.partition(".*.")
            for expert in range(tensor.shape[0]):
                matrix = replace(tensor, shape=tensor.shape[1:], entry=slice_expert(tensor.entry, expert))
                yield f"{before}.{expert}.{after}", matrix, interleaved
        elif gguf_module == "ffn_gate_inp_shexp" and len(tensor.shape) == 1:
            entry = replace(tensor.entry, shape=(1, *tensor.entry.shape))
            yield name, replace(tensor, shape=(1, *tensor.shape), entry=entry), interleaved
        else:
            yield name, tensor, interleaved


def _transformers_name(architecture: GgufArchitecture, name: str, tensor: GgufTensor) -> tuple[str, str]:
    """Return transformers' name of a tensor, and the name of its module in llama.cpp."""
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE and stem != name:
        return f"{_OUTSIDE[stem]}.weight", stem
    match = _LAYER_TENSOR.fullmatch(name)
    has_bias = architecture.has_qkv_bias and match is not None and match["name"] in ("attn_q", "attn_k", "attn_v")
    if match is None or match["name"] not in architecture.layer_names or (match["kind"] == "bias" and not has_bias):
        raise UserError(
            f"{tensor.entry.path}: holds {name}, which {architecture.class_name} of transformers does not have; give "
            "the model in another format"
        )
    module = architecture.layer_names[match["name"]]
    if "*" in module and len(tensor.shape) != 3:
        raise UserError(
            f"{tensor.entry.path}: {name} has the shape {tensor.shape}, not [experts, out, in]; get the file anew"
        )
    return f"model.layers.{match['layer']}.{module}.{match['kind']}", match["name"]
