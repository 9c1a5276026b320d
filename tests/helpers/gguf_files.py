"""GGUF files of tiny models, with the names, metadata and order of rows that llama.cpp's converter writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import torch

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
MIXED_TYPES = {
    "token_embd": "Q6_K",
    "output": "Q8_0",
    "attn_q": "Q4_K",
    "attn_k": "BF16",
    "attn_v": "Q5_K",
    "attn_output": "Q5_0",
    "ffn_gate": "Q4_0",
    "ffn_up": "Q8_0",
    "ffn_down": "IQ4_NL",
    "ffn_gate_exps": "Q4_0",
    "ffn_up_exps": "Q4_K",
    "ffn_down_exps": "Q5_0",
    **dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"), "Q8_0"),
}
"""Types of tensors by the last part of their names. Others are F32, as norms and routers are in published files."""


def random_blocks(shape: tuple[int, ...], type_name: str, seed: int = 0) -> np.ndarray:
    """Return random codes with scales from 0.001 to 0.01, uint8[*shape[:-1], row bytes]."""
    quant_type = gguf.GGMLQuantizationType[type_name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[quant_type]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // block, block_bytes), dtype=np.uint8)
    for place in SCALE_PLACES[type_name]:
        scales = random.uniform(0.001, 0.01, blocks.shape[:-1]).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


SCALE_PLACES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ2_0": (64,),
}
"""First bytes of the fp16 numbers in a block of each type, as in llama.cpp's ggml-common.h."""


def write_gguf(
    source: Path,
    path: Path,
    types: dict[str, str] | str,
    *,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    pre: str = "gpt-2",
    split_tensors: int = 0,
) -> Path:
    """Write the model in `source` as a GGUF file, or as files of at most `split_tensors` tensors.

    Matrices are of the type in `types`, with random values if `gguf` cannot quantize to it. `edit` adds metadata.
    """
    config = json.loads((source / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=split_tensors)
    _add_metadata(writer, config)
    _add_tokenizer(writer, source, config["vocab_size"], pre)
    edit(writer)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, tensor in _stacked_experts(safetensors.torch.load_file(source / "model.safetensors")).items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        stem = gguf_name.rsplit(".", 1)[0].rsplit(".", 1)[-1]
        values = tensor.float().numpy()
        if arch == gguf.MODEL_ARCH.LLAMA and stem in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if stem == "attn_q" else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if stem == "ffn_gate_inp_shexp":
            values = values[0]  # the converter writes it without its first dimension
        kind = types if isinstance(types, str) else types.get(stem, "F32")
        _add_tensor(writer, gguf_name, values, kind if values.ndim > 1 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, type_name: str) -> None:
    quant_type = gguf.GGMLQuantizationType[type_name]
    try:
        data = gguf.quants.quantize(np.ascontiguousarray(values), quant_type)
    except NotImplementedError:
        data = random_blocks(values.shape, type_name, seed=len(name))
    writer.add_tensor(name, data, raw_dtype=quant_type)


def _stacked_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack the matrices of all experts under the names that `gguf` maps, as the converter does."""
    stacked: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        before, separator, after = name.partition(".mlp.experts.")
        if not separator:
            stacked[name] = tensor
        elif (projection := after.partition(".")[2]) and (joint := f"{before}.mlp.experts.{projection}") not in stacked:
            count = sum(other.startswith(f"{before}.mlp.experts.") and other.endswith(projection) for other in tensors)
            experts = [tensors[f"{before}.mlp.experts.{expert}.{projection}"] for expert in range(count)]
            stacked[joint] = torch.stack(experts)
    return stacked


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if config["model_type"] in ("llama", "mistral"):
        writer.add_rope_dimension_count(config["head_dim"])
    else:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path, vocab_size: int, pre: str) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    special = {item["content"]: item["id"] for item in tokenizer["added_tokens"]}
    by_index = {index: token for token, index in (vocab | special).items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([by_index.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    kinds = {
        **dict.fromkeys(by_index, gguf.TokenType.NORMAL),
        **dict.fromkeys(special.values(), gguf.TokenType.CONTROL),
    }
    writer.add_token_types([kinds.get(index, gguf.TokenType.UNUSED) for index in range(vocab_size)])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(special["<|im_start|>"])
    writer.add_eos_token_id(special["<|im_end|>"])
    writer.add_pad_token_id(special["<pad>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((source / "chat_template.jinja").read_text())
