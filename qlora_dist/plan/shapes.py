"""The parameters of a dense decoder model, from its config.json: what the engine gathers together, and how large.

Covers the architectures whose blocks are Llama's: Llama, Mistral, Qwen2, Qwen3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_dist.config import LoraConfig
from qlora_dist.nf4.layout import NF4Layout

UnitKind = Literal["embedding", "shared_embedding", "layer", "head", "root"]


@dataclass(frozen=True)
class Parameter:
    """A parameter as the engine sees it."""

    shape: tuple[int, ...]
    trained: bool = False
    is_bytes: bool = False
    """A quantized weight's byte vector; every other one has a floating type."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and freed together."""

    kind: UnitKind
    parameters: tuple[Parameter, ...]


def decoder_units(
    config: Mapping[str, Any],
    lora: LoraConfig,
    block_size: int = 64,
    double_quant: bool = True,
    embeddings: Literal["16bit", "4bit"] = "16bit",
) -> list[Unit]:
    """The units of a model, in forward order.

    Args:
        config: config.json.
        lora: the section `lora`.
        block_size: of the quantized base.
        double_quant: of the quantized base.
        embeddings: of the input embedding and the output head.
    """
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    embedding = Parameter((vocabulary, hidden))
    if embeddings == "4bit":
        layout = NF4Layout((vocabulary, hidden), "nf4", block_size, double_quant)
        embedding = Parameter((layout.total_bytes,), is_bytes=True)
    layer = Unit("layer", tuple(_layer(config, lora, block_size, double_quant)))
    tied = config.get("tie_word_embeddings", False)
    return [
        Unit("shared_embedding" if tied else "embedding", (embedding,)),
        *[layer] * config["num_hidden_layers"],
        *([] if tied else [Unit("head", (embedding,))]),
        Unit("root", (Parameter((hidden,)),)),
    ]


def _layer(config: Mapping[str, Any], lora: LoraConfig, block_size: int, double_quant: bool) -> list[Parameter]:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    qkv_bias = config["model_type"] == "qwen2" or config.get("attention_bias", False)
    o_bias = config["model_type"] != "qwen2" and config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    linears = {
        "q_proj": (heads * head_dim, hidden, qkv_bias),
        "k_proj": (kv_heads * head_dim, hidden, qkv_bias),
        "v_proj": (kv_heads * head_dim, hidden, qkv_bias),
        "o_proj": (hidden, heads * head_dim, o_bias),
        "gate_proj": (intermediate, hidden, mlp_bias),
        "up_proj": (intermediate, hidden, mlp_bias),
        "down_proj": (hidden, intermediate, mlp_bias),
    }
    parameters = [Parameter((hidden,)), Parameter((hidden,))]  # the two norms
    if config["model_type"] == "qwen3":
        parameters += [Parameter((head_dim,)), Parameter((head_dim,))]  # norms of queries and keys
    for name, (rows, columns, bias) in linears.items():
        layout = NF4Layout((rows, columns), "nf4", block_size, double_quant)
        parameters.append(Parameter((layout.total_bytes,), is_bytes=True))
        if bias:
            parameters.append(Parameter((rows,)))
        if lora.targets == "all-linear" or name in lora.targets:
            parameters += [Parameter((lora.r, columns), trained=True), Parameter((rows, lora.r), trained=True)]
            if lora.dora:
                parameters.append(Parameter((rows,), trained=True))
    return parameters
