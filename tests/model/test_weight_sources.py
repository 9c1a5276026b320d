"""If this fails, a model's parameter is loaded from the wrong tensors of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.core_model_loading import Transpose, WeightConverter

from qlora_dist.errors import UserError
from qlora_dist.model import weight_sources
from qlora_dist.model.weight_sources import WeightSource, find_weight_sources, stacked_tensor_name
from qlora_dist.nf4.quant_state import expert_key
from tests.helpers.architectures import ARCHITECTURES, SETTINGS_OF_ALL, make_architecture

EXPERTS = "model.layers.0.block_sparse_moe.experts"


def model_on_meta(name: str) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**(SETTINGS_OF_ALL | ARCHITECTURES[name]))
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def join_tensors(source: WeightSource, saved: dict[str, torch.Tensor]) -> torch.Tensor:
    tensors = [saved[key] for key in source.keys]
    if not source.experts:
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    per_expert = len(tensors) // source.experts
    starts = range(0, len(tensors), per_expert)
    return torch.stack([torch.cat(tensors[start : start + per_expert]) for start in starts])


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bloom", "OPT", "Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss"])
def test_tensors_of_the_sources_are_the_parameters_that_transformers_loads(name: str, tmp_path: Path) -> None:
    folder = make_architecture(tmp_path, name, num_hidden_layers=2)
    saved = {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sources = find_weight_sources(model, saved)
    for parameter, value in model.named_parameters():
        assert torch.equal(join_tensors(sources[parameter], saved), value), parameter


def mixtral_names(*, without: str = "") -> list[str]:
    names = [f"{EXPERTS}.{expert}.{part}.weight" for expert in range(12) for part in ("w1", "w2", "w3")]
    return [name for name in names if name != without]


def test_experts_are_in_order_of_their_numbers() -> None:
    sources = find_weight_sources(model_on_meta("Mixtral"), reversed(mixtral_names()))
    gate_up = sources["model.layers.0.mlp.experts.gate_up_proj"]
    assert gate_up.experts == 12
    assert gate_up.keys == tuple(f"{EXPERTS}.{expert}.{part}.weight" for expert in range(12) for part in ("w1", "w3"))


def test_a_missing_matrix_of_an_expert_is_an_error() -> None:
    names = mixtral_names(without=f"{EXPERTS}.3.w3.weight")
    with pytest.raises(
        UserError, match=r"gate_up_proj: some of its experts' matrices are missing; get the folder anew"
    ):
        find_weight_sources(model_on_meta("Mixtral"), names)


def test_experts_of_a_4_bit_folder_that_were_one_tensor() -> None:
    target = "model.layers.0.mlp.experts.gate_up_proj"
    keys = tuple(expert_key(target, expert) for expert in range(4))
    assert keys[3] == f"{target}.3.weight"
    assert find_weight_sources(model_on_meta("GptOss"), keys)[target] == WeightSource(keys, 4)
    assert [stacked_tensor_name(key, expert) for expert, key in enumerate(keys)] == [target] * 4
    assert stacked_tensor_name(keys[1], 2) == keys[1]
    assert stacked_tensor_name("model.norm.weight", 0) == "model.norm.weight"


def test_names_without_the_prefix_of_the_decoder_and_unknown_names() -> None:
    names = ["layers.0.mlp.up_proj.weight", "norm.weight", "lm_head.weight", "vision.weight", "layers.9.norm.weight"]
    assert find_weight_sources(model_on_meta("Llama"), names) == {
        "model.layers.0.mlp.up_proj.weight": WeightSource(("layers.0.mlp.up_proj.weight",)),
        "model.norm.weight": WeightSource(("norm.weight",)),
        "lm_head.weight": WeightSource(("lm_head.weight",)),
    }


def test_an_unsupported_conversion_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    converter = WeightConverter("norm.weight", "norm.weight", operations=[Transpose(0, 1)])
    monkeypatch.setattr(weight_sources, "get_model_conversion_mapping", lambda model: [converter])
    with pytest.raises(
        UserError, match=r"norm\.weight: transformers rearranges it on loading \(Transpose\), which is not"
    ):
        find_weight_sources(model_on_meta("Llama"), ["model.norm.weight"])
