"""The matrices, norms and sizes of each architecture's decoder layers, from config.json.

Names follow transformers' classes. A new architecture needs only an entry in `_SUPPORTED_MODEL_TYPES` if its blocks
differ from Llama's in nothing but norms, biases or experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_dist.config.sections import LoraConfig
from qlora_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """A quantized projection, of one linear layer or of all experts of a layer."""

    name: str
    rows: int
    """out_features of one of its parts."""
    in_features: int
    has_bias: bool = False
    experts: int = 0
    """Number of experts; 0 for a plain linear layer."""
    parts: int = 1
    """Number of projections that one tensor stacks in each expert (gate and up)."""
    has_lora: bool = True
    """True if the section `lora` adapts it."""

    @property
    def numel(self) -> int:
        """Number of weights, all experts together."""
        return self.rows * self.in_features * self.parts * (self.experts or 1)


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Sizes of the attention of a layer."""

    heads: int
    kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    window: int | None = None
    """Positions that a token attends to; None means all before it."""
    is_eager: bool = False
    """True if all scores are materialized, because SDPA has no soft cap."""
    has_qk_norm: bool = False
    latent_ranks: tuple[int, int] | None = None
    """Ranks of the queries (0 for none) and of keys and values in multi-head latent attention."""


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """A decoder layer."""

    matrices: tuple[LinearSpec, ...]
    attention: AttentionSpec
    plain: tuple[tuple[int, ...], ...]
    """Shapes of parameters that are not quantized, without biases: norms and routers."""
    hidden: int
    intermediate_size: int
    """Intermediate size of the dense MLP, or of the shared experts; 0 if there are none."""
    moe_intermediate_size: int = 0
    num_experts_per_tok: int = 0
    has_fp32_router_weights: bool = False
    """True if the router's weights, and so the experts' weighted outputs, are fp32."""
    is_sparse: bool = False
    num_norms: int = 2
    """Number of norms over the hidden dimension."""
    rope_head_dim: int = 0
    """Dimensions of a head that rotary embeddings rotate."""
    buffer_bytes: int = 0


def decoder_layer_specs(config: Mapping[str, Any], lora: LoraConfig) -> list[LayerSpec]:
    """Return the layers in forward order; equal layers are the same object.

    Raises:
        UserError: the architecture is not supported.
    """
    kind = config.get("model_type")
    if kind not in _SUPPORTED_MODEL_TYPES:
        raise UserError(
            f"model_type {kind} is not among those that can be planned "
            f"({', '.join(sorted(_SUPPORTED_MODEL_TYPES))}); give one of these"
        )
    distinct: dict[LayerSpec, LayerSpec] = {}
    layers = []
    for index in range(config["num_hidden_layers"]):
        layer = _layer(config, index, lora)
        layers.append(distinct.setdefault(layer, layer))
    return layers


_SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral", "qwen3_moe", "deepseek_v3")


def _layer(config: Mapping[str, Any], index: int, lora: LoraConfig) -> LayerSpec:
    hidden = config["hidden_size"]
    if config["model_type"] == "deepseek_v3":
        attention, matrices, plain = _latent_attention(config)
    else:
        attention, matrices, plain = _attention(config, index)
    norms = 4 if config["model_type"] == "gemma2" else 2
    plain += [(hidden,)] * norms
    intermediate = expert_intermediate = per_token = buffer_bytes = 0
    if _is_sparse(config, index):
        experts = config.get("num_local_experts") or config.get("num_experts") or config["n_routed_experts"]
        expert_intermediate = config.get("moe_intermediate_size") or config["intermediate_size"]
        per_token = config["num_experts_per_tok"]
        plain.append((experts, hidden))  # the router
        matrices += [
            replace(_linear("gate_up_proj", expert_intermediate, hidden), experts=experts, parts=2),
            replace(_linear("down_proj", hidden, expert_intermediate), experts=experts),
        ]
        if config["model_type"] == "deepseek_v3":
            intermediate = expert_intermediate * config["n_shared_experts"]
            buffer_bytes = 4 * experts  # the router's score correction, fp32
    else:
        intermediate = config["intermediate_size"]
    if intermediate:
        bias = bool(config.get("mlp_bias", False)) and config["model_type"] == "llama"
        matrices += [
            _linear("gate_proj", intermediate, hidden, has_bias=bias),
            _linear("up_proj", intermediate, hidden, has_bias=bias),
            _linear("down_proj", hidden, intermediate, has_bias=bias),
        ]

    def has_lora(matrix: LinearSpec) -> bool:
        return lora.experts if matrix.experts else lora.targets == "all-linear" or matrix.name in lora.targets

    return LayerSpec(
        matrices=tuple(replace(matrix, has_lora=has_lora(matrix)) for matrix in matrices),
        attention=attention,
        plain=tuple(plain),
        hidden=hidden,
        intermediate_size=intermediate,
        moe_intermediate_size=expert_intermediate,
        num_experts_per_tok=per_token,
        has_fp32_router_weights=bool(per_token) and config["model_type"] != "qwen3_moe",
        is_sparse=bool(per_token),
        num_norms=norms,
        rope_head_dim=config.get("qk_rope_head_dim") or head_dim(config),
        buffer_bytes=buffer_bytes,
    )


def _linear(name: str, rows: int, in_features: int, *, has_bias: bool = False) -> LinearSpec:
    return LinearSpec(name=name, rows=rows, in_features=in_features, has_bias=has_bias)


def _attention(config: Mapping[str, Any], index: int) -> tuple[AttentionSpec, list[LinearSpec], list[tuple[int, ...]]]:
    kind, hidden, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    size = head_dim(config)
    o_bias = bool(config.get("attention_bias", False)) and kind not in ("mistral", "mixtral", "qwen2")
    qkv_bias = o_bias or kind == "qwen2"
    has_qk_norm = kind in ("qwen3", "qwen3_moe")
    attention = AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        qk_head_dim=size,
        v_head_dim=size,
        window=_window(config, index),
        is_eager=kind == "gemma2" and config.get("attn_logit_softcapping", 50.0) is not None,
        has_qk_norm=has_qk_norm,
    )
    matrices = [
        _linear("q_proj", heads * size, hidden, has_bias=qkv_bias),
        _linear("k_proj", kv_heads * size, hidden, has_bias=qkv_bias),
        _linear("v_proj", kv_heads * size, hidden, has_bias=qkv_bias),
        _linear("o_proj", hidden, heads * size, has_bias=o_bias),
    ]
    return attention, matrices, [(size,), (size,)] if has_qk_norm else []


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the head dimension of attention that is not latent."""
    default = 256 if config["model_type"] == "gemma2" else config["hidden_size"] // config["num_attention_heads"]
    return config.get("head_dim") or default


def _latent_attention(config: Mapping[str, Any]) -> tuple[AttentionSpec, list[LinearSpec], list[tuple[int, ...]]]:
    """Return the parts of multi-head latent attention (DeepSeek-V2, section 2.1)."""
    hidden, heads, bias = config["hidden_size"], config["num_attention_heads"], bool(config.get("attention_bias"))
    rotated, plain_dim, v_dim = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    q_rank, kv_rank, qk_dim = config.get("q_lora_rank") or 0, config["kv_lora_rank"], rotated + plain_dim
    norms: list[tuple[int, ...]] = [(kv_rank,)]
    if q_rank:
        matrices = [_linear("q_a_proj", q_rank, hidden, has_bias=bias), _linear("q_b_proj", heads * qk_dim, q_rank)]
        norms.append((q_rank,))
    else:
        matrices = [_linear("q_proj", heads * qk_dim, hidden)]
    matrices += [
        _linear("kv_a_proj_with_mqa", kv_rank + rotated, hidden, has_bias=bias),
        _linear("kv_b_proj", heads * (plain_dim + v_dim), kv_rank),
        _linear("o_proj", hidden, heads * v_dim, has_bias=bias),
    ]
    attention = AttentionSpec(
        heads=heads, kv_heads=heads, qk_head_dim=qk_dim, v_head_dim=v_dim, latent_ranks=(q_rank, kv_rank)
    )
    return attention, matrices, norms


def _window(config: Mapping[str, Any], index: int) -> int | None:
    kind, window = config["model_type"], config.get("sliding_window")
    if kind in ("mistral", "mixtral"):
        return window
    if kind == "gemma2":
        return window if index % 2 == 0 else None
    if config.get("use_sliding_window", False):  # Qwen's
        return window if index >= config.get("max_window_layers", 0) else None
    return None


def _is_sparse(config: Mapping[str, Any], index: int) -> bool:
    kind: str = config["model_type"]
    if kind == "qwen3_moe":
        dense = index in (config.get("mlp_only_layers") or [])
        step: int = config.get("decoder_sparse_step") or 1
        return not dense and (index + 1) % step == 0
    if kind == "deepseek_v3":
        first: int = config["first_k_dense_replace"]
        return index >= first
    return kind == "mixtral"
