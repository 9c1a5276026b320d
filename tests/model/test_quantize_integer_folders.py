"""If this fails, a folder in an integer format is quantized to other 4-bit weights than its dequantized values are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from tests.helpers.architectures import make_architecture
from tests.helpers.published_integer_folders import INTEGER_FORMATS, KIMI_K2, publish_folder, set_values
from tests.helpers.tiny_models import make_model


def quantized_tensors(source: Path, out: Path) -> dict[str, torch.Tensor]:
    quantize_folder(source, out, QuantizeOptions(min_share=0.5))
    return {k: v for file in out.glob("*.safetensors") for k, v in safetensors.torch.load_file(file).items()}


def check(source: Path, published: Path, values: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert ModelFolder(published).published.keys() == values.keys()
    actual = quantized_tensors(published, tmp_path / "published-nf4")
    expected = quantized_tensors(set_values(source, values), tmp_path / "source-nf4")
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
    source = make_architecture(tmp_path / "source", "DeepseekV3", torch.bfloat16)
    values = publish_folder(source, tmp_path / "published", "int4", "mlp.experts", **KIMI_K2)
    assert "model.layers.2.mlp.experts.3.down_proj.weight" in values
    check(source, tmp_path / "published", values, tmp_path)
    assert json.loads((tmp_path / "published-nf4" / "config.json").read_text())["model_type"] == "kimi_k2"
