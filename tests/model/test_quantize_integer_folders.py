"""If this fails, a folder in an integer format is quantized to other 4-bit weights than its dequantized values are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from tests.helpers.published_integer_folders import INTEGER_FORMATS, publish_folder
from tests.helpers.tiny_models import make_model, make_tokenizer


def write_dequantized(source: Path, values: dict[str, torch.Tensor]) -> Path:
    """Give the weights of a 16-bit folder the values of a published one."""
    path = source / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path) | values, path, {"format": "pt"})
    return source


def quantized_tensors(source: Path, out: Path) -> dict[str, torch.Tensor]:
    quantize_folder(source, out, QuantizeOptions(min_share=0.5))
    return {k: v for file in out.glob("*.safetensors") for k, v in safetensors.torch.load_file(file).items()}


def check(source: Path, published: Path, values: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert ModelFolder(published).published.keys() == values.keys()
    actual = quantized_tensors(published, tmp_path / "published-nf4")
    expected = quantized_tensors(write_dequantized(source, values), tmp_path / "source-nf4")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("name", INTEGER_FORMATS)
def test_same_as_the_dequantized_folder(tmp_path, name):
    source = make_model(tmp_path / "source")
    values = publish_folder(source, tmp_path / "published", name)
    assert len(values) == 21
    check(source, tmp_path / "published", values, tmp_path)


def test_kimi_k2_is_opened_as_deepseek_v3(tmp_path):
    source, published = make_deepseek(tmp_path / "source"), tmp_path / "published"
    values = publish_folder(source, published, "int4")
    assert any("mlp.experts.3.down_proj" in name for name in values)
    config = json.loads((published / "config.json").read_text())
    files = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model"}
    (published / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2", "auto_map": files}))
    check(source, published, values, tmp_path)
    assert json.loads((tmp_path / "published-nf4" / "config.json").read_text())["model_type"] == "kimi_k2"


def make_deepseek(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
    transformers.DeepseekV3ForCausalLM(config).bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
