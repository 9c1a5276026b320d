"""If this fails, the model that is trained differs from transformers' model of the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from qlora_dist.adapters.attach import attach_adapter, make_peft_config
from qlora_dist.config.sections import LoraConfig, ModelConfig
from qlora_dist.errors import UserError
from qlora_dist.formats.fp8 import Fp8Layout
from qlora_dist.layers.embedding import QuantizedEmbedding, QuantizedVocabMixin
from qlora_dist.layers.experts import QuantizedExperts
from qlora_dist.layers.linear import QuantizedLinear
from qlora_dist.model.buffers import init_buffers
from qlora_dist.model.meta_model import LossModel, build_meta_model, get_decoder_layers, transformers_names
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.nf4.quantize import dequantize_weight, quantize_weight
from tests.helpers.architectures import make_architecture
from tests.helpers.published_folders import publish_float_folder
from tests.helpers.tiny_models import make_model

NAMES = ["Llama", "Qwen2", "GPT2", "Gemma2", "Bloom", "Mixtral", "GptOss"]


def build(folder: Path, *, quantize: bool = True, **settings: Any) -> LossModel:
    config = ModelConfig(base=str(folder), **({"compute_dtype": "fp32"} | settings))
    return build_meta_model(ModelFolder(folder), config, quantize=quantize)


def quantize_from(
    value: torch.Tensor, module: QuantizedLinear | QuantizedVocabMixin, *, transposed: bool
) -> torch.Tensor:
    """Return a packed matrix, and replace its value by the dequantized one."""
    packed, layout = quantize_weight(value.T if transposed else value)
    assert layout == module.layout
    dequantized = dequantize_weight(packed, layout, torch.float32)
    value.copy_(dequantized.T if transposed else dequantized)
    return packed


def quantize_experts_from(value: torch.Tensor, module: QuantizedExperts, *, transposed: bool) -> torch.Tensor:
    rows = module.layout.shape[0]
    packed = []
    for expert in value:
        for part in (expert.T if transposed else expert).split(rows):
            vector, layout = quantize_weight(part)
            packed.append(vector)
            part.copy_(dequantize_weight(vector, layout, torch.float32))
    return torch.cat(packed)


@torch.no_grad()
def load_from(model: LossModel, plain: transformers.PreTrainedModel) -> None:
    """Give a model on meta the weights of transformers' model, which get the error of quantization too."""
    model.to_empty(device="cpu")
    init_buffers(model)
    values, names = plain.state_dict(), transformers_names(model)
    for name, buffer in model.named_buffers():
        if name in values:
            buffer.copy_(values[name])
    for name, parameter in model.named_parameters():
        module, value = model.get_submodule(name.rpartition(".")[0]), values[names[name]]
        if parameter.dtype != torch.uint8:
            parameter.copy_(value)
        elif isinstance(module, QuantizedExperts):
            owner = plain.get_submodule(names[name].rpartition(".")[0])
            parameter.copy_(quantize_experts_from(value, module, transposed=owner.is_transposed))
        else:
            owner = plain.get_submodule(names[name].rpartition(".")[0])
            parameter.copy_(quantize_from(value, module, transposed=isinstance(owner, Conv1D)))


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_loss_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = make_architecture(tmp_path, name, num_hidden_layers=2)
    attention = "eager" if name == "Gemma2" else None  # SDPA would omit its soft cap
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    model = build(folder).eval()
    load_from(model, plain)
    ids = torch.randint(3, 300, (2, 24))
    labels = torch.randint(3, 300, (2, 24)).masked_fill(torch.rand(2, 24) < 0.3, -100)
    with torch.no_grad():
        expected = plain(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        positions = torch.arange(24).repeat(2, 1)
        loss = model(input_ids=ids, position_ids=positions, labels=labels)
    expected_loss = cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [*NAMES, "DeepseekV3", "Falcon"])
def test_parameters_stand_for_all_of_transformers(name: str, tmp_path: Path) -> None:
    folder = make_architecture(tmp_path, name, num_hidden_layers=2)
    model = build(folder, compute_dtype="bf16")
    with torch.device("meta"):
        plain = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    names = transformers_names(model)
    assert {names[name] for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}
    for module_name, module in plain.named_modules():
        if type(module) is torch.nn.Linear and module is not plain.get_output_embeddings():
            quantized = model.get_submodule(module_name)
            assert isinstance(quantized, QuantizedLinear) and quantized.layout.shape == module.weight.shape
            assert (quantized.bias is None) == (module.bias is None)
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.bfloat16}
    assert model.matrices.keys() <= model.origins.keys()


def test_a_model_in_16_bit(tmp_path: Path) -> None:
    folder = make_architecture(tmp_path, "Mixtral")
    model = build(folder, quantize=False, embeddings="4bit")
    assert not model.matrices
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_embeddings_in_4_bit(tmp_path: Path) -> None:
    model = build(make_architecture(tmp_path, "Llama"), embeddings="4bit")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding) and embedding.layout.shape == (320, 64)
    assert isinstance(model.get_output_embeddings(), QuantizedVocabMixin)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= model.matrices.keys()


def test_names_do_not_depend_on_an_adapter(tmp_path: Path) -> None:
    folder = make_architecture(tmp_path, "Mixtral")
    model = build(folder)
    names = set(transformers_names(model).values())
    attach_adapter(model, make_peft_config(model, LoraConfig(r=4, experts=True, dropout=0.0), str(folder)))
    adapted = transformers_names(model)
    base = {plain for name, plain in adapted.items() if "lora_" not in name}
    assert base == names
    assert adapted["model.layers.0.self_attn.q_proj.base_layer.packed"] == "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(("name", "path"), [("Llama", "model.layers"), ("GPT2", "transformer.h")])
def test_decoder_layers(name: str, path: str, tmp_path: Path) -> None:
    model = build(make_architecture(tmp_path, name))
    assert get_decoder_layers(model) is model.get_submodule(path)


def test_decoder_layers_that_hold_lists() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LongcatFlashConfig(num_layers=1))
    assert len(model.model.layers[0].self_attn) == model.config.num_hidden_layers
    assert get_decoder_layers(model) is model.model.layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {}}, "a model of type llama has no language model apart from its images or sounds"),
        ({"model_type": "of-tomorrow"}, "cannot build a causal language model from it"),
        ({"vocab_size": 321}, r"has the shape \(320, 64\) and config.json asks for \(321, 64\)"),
        ({"num_hidden_layers": 4}, r"the weight model\.layers\.3\..* is missing; get the folder anew"),
    ],
)
def test_a_wrong_configuration_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = make_architecture(tmp_path, "Llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message) as error:
        build(folder)
    assert "\n" not in str(error.value)


def test_a_kept_format_needs_one_and_leaves_the_choice_of_embeddings(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "Qwen3")
    publish_float_folder(source, tmp_path / "fp8", "fp8")
    config = ModelConfig(base=str(tmp_path / "fp8"), keep_format=True, embeddings="4bit")
    model = build_meta_model(ModelFolder(tmp_path / "fp8"), config)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, QuantizedLinear) and isinstance(layer.layout, Fp8Layout)
    with pytest.raises(UserError, match="is in 16 bit, not in a published format such as FP8"):
        build_meta_model(ModelFolder(source), config)
