"""Tiny models with random weights, tokenizers and data sets, which are made in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = ["alpha", "beta", "gamma", "delta", "hello", "world", "this", "is", "text", "about", "what", "where", "who"]
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


def make_model(folder: Path, arch: str = "Llama", dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """Save a causal LM of an architecture (Llama, Qwen2, Qwen3, Mistral) and a tokenizer, and return the folder."""
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 176,  # not a multiple of the block size
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{arch}Config")
    model = getattr(transformers, f"{arch}ForCausalLM")(config_class(**(settings | config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # biases are zero by default, and a lost bias would go unnoticed
                parameter.normal_(std=0.1)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer(chat_template: str | None = CHATML) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most 310 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>"
    )
    wrapped.chat_template = chat_template
    return wrapped


def make_data(path: Path, rows: int, seed: int = 0, words: tuple[int, int] = (2, 12)) -> Path:
    """Write a JSONL file of one-turn conversations of random words."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(rows):
            question, answer = (" ".join(rng.choices(WORDS, k=rng.randint(*words))) for _ in range(2))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def make_config(folder: Path, base: Path, **overrides: Any) -> Path:
    """Write a configuration in fp32 for `base`, and a training and a held-out file."""
    train, held_out = make_data(folder / "train.jsonl", 80), make_data(folder / "eval.jsonl", 9, seed=1)
    tree: dict[str, dict[str, Any]] = {
        "model": {"base": str(base), "compute_dtype": "fp32"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"train": [str(train)], "eval": str(held_out), "seq_len": 96, "cache": str(folder / "cache")},
        "parallel": {"base": "world"},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "train": {"steps": 10, "global_batch": 12, "device": "cpu"},
        "run": {"dir": str(folder / "runs"), "name": "run", "report": False},  # matplotlib takes a second
    }
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def make_large_config(folder: Path) -> Path:
    """Write a configuration for a larger model in 4 bit, whose sizes are multiples of 3 and 4.

    Padding, whole rows and rotary frequencies are less than one per cent of it.
    """
    from qlora_dist.model.quantize_folder import quantize_folder
    from qlora_dist.model.quantize_plan import QuantizeOptions

    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 516}
    source = make_model(folder / "source", hidden_size=384, intermediate_size=768, num_hidden_layers=4, **heads)
    quantized = quantize_folder(source, folder / "nf4", QuantizeOptions()).out
    return make_config(folder, quantized, model__compute_dtype="bf16")
