"""If this fails, a folder in an integer format is quantized to other 4-bit weights than its dequantized values are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from qlora_dist.errors import UserError
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from tests.helpers.architectures import make_architecture
from tests.helpers.published_folders import publish_mxfp4_folder
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


def test_codes_without_a_configuration_are_refused(tmp_path):
    publish_folder(make_model(tmp_path / "source"), tmp_path / "published", "bnb-int8")
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "published" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"q_proj.weight is int8, which quantization_config in config.json does not"):
        quantize_folder(tmp_path / "published", tmp_path / "out", QuantizeOptions())
    assert not (tmp_path / "out").exists()


def test_a_missing_expert_is_refused(tmp_path):
    source = make_architecture(tmp_path / "source", "GptOss", torch.bfloat16)
    publish_mxfp4_folder(source, tmp_path / "mxfp4")
    path = tmp_path / "mxfp4" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    for end in ("blocks", "scales"):
        name = f"model.layers.1.mlp.experts.gate_up_proj_{end}"
        tensors[name] = tensors[name][:3].contiguous()
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"is one of 3 matrices, which 4 experts in config.json cannot share"):
        quantize_folder(tmp_path / "mxfp4", tmp_path / "out", QuantizeOptions())
    assert not (tmp_path / "out").exists()


def test_values_that_cannot_be_decoded_are_refused(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    damages = {"g_idx": lambda t: t + 100, "scales": lambda t: torch.full_like(t, float("nan"))}
    for part, damage in damages.items():
        published = tmp_path / f"bad-{part}"
        publish_folder(source, published, "gptq")
        path = published / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        name = f"model.layers.0.mlp.up_proj.{part}"
        safetensors.torch.save_file(tensors | {name: damage(tensors[name])}, path, {"format": "pt"})
        message = "g_idx names another group" if part == "g_idx" else "up_proj.weight holds values that are not finite"
        with pytest.raises(UserError, match=message):
            quantize_folder(published, tmp_path / f"out-{part}", QuantizeOptions(min_share=0.5))
