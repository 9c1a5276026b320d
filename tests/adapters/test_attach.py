"""If this fails, a target has no adapter, or PEFT does not load the trained adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.layer import LoraLayer

from qlora_dist.adapters.attach import named_trainable_parameters
from qlora_dist.adapters.export import config_to_save, peft_key, write_adapter
from qlora_dist.config.config_file import load_config
from qlora_dist.errors import UserError
from qlora_dist.train.run_setup import set_up_model
from tests.helpers import tiny_models
from tests.helpers.architectures import make_architecture

# architecture, settings, overrides, and number of adapted layers and experts' parameters
CASES: list[tuple[str, dict[str, Any], tuple[str, ...], int]] = [
    ("DeepseekV3", {}, ("lora.experts=true",), 3 * 5 + 3 + 2 * (3 + 2)),  # a dense layer, two with shared experts
    ("Qwen3Moe", {"mlp_only_layers": [0]}, ("lora.targets=[q_proj,gate_proj]",), 3 + 1),
    ("Llama4", {}, ("lora.experts=true",), 3 * (4 + 3 + 2)),  # PEFT confuses the experts' inputs and outputs
    ("CTRL", {"dff": 96}, (), 3 * 6),  # layers whose names are numbers
]


@pytest.mark.parametrize(("name", "settings", "overrides", "count"), CASES, ids=[case[0] for case in CASES])
def test_peft_loads_the_trained_tensors(
    name: str, settings: dict[str, Any], overrides: tuple[str, ...], count: int, tmp_path: Path
) -> None:
    source = make_architecture(tmp_path / "source", name, **settings)
    config = load_config(tiny_models.make_config(tmp_path, source), ["data.packing=none", *overrides])
    _, model, adapter = set_up_model(config)
    adapted = {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert len(adapted) == count
    tensors = {peft_key(parameter): torch.randn(p.shape) for parameter, p in named_trainable_parameters(model)}
    assert len(tensors) == 2 * count
    write_adapter(tensors, config_to_save(adapter), tmp_path / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(source)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert sum(p.numel() for n, p in loaded.named_parameters() if "lora_" in n) == sum(
        map(torch.numel, tensors.values())
    )
    back = peft.get_peft_model_state_dict(loaded)
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_an_adapter_that_peft_cannot_read_is_refused_before_the_run(tmp_path: Path) -> None:
    """PEFT would omit the shared experts of Laguna, and does not support DoRA of a parameter."""
    for name, settings, override, message in (
        (
            "Laguna",
            {},
            "lora.r=4",
            r"^lora: PEFT would read other tensors .*shared_experts.* missing in PEFT\); adapt fewer layers",
        ),
        (
            "DeepseekV3",
            {},
            "lora.dora=true",
            r"^lora\.dora: PEFT adapts down_proj, gate_proj, up_proj of this model as",
        ),
    ):
        folder = tmp_path / name
        source = make_architecture(folder / "source", name, **settings)
        config = load_config(tiny_models.make_config(folder, source), ["data.packing=none", override])
        with pytest.raises(UserError, match=message) as error:
            set_up_model(config)
        assert "\n" not in str(error.value)


def test_a_tied_head_is_not_trained_separately(tmp_path: Path) -> None:
    source = tiny_models.make_model(tmp_path / "source", tie_word_embeddings=True)
    config = load_config(tiny_models.make_config(tmp_path, source), ["lora.modules_to_save=[embed_tokens,lm_head]"])
    with pytest.raises(UserError, match=r"lm_head is tied to the embedding in .*; leave it out, because it follows"):
        set_up_model(config)


def test_dropout_is_saved_as_zero_if_there_are_target_parameters(tmp_path: Path) -> None:
    source = make_architecture(tmp_path / "source", "DeepseekV3")
    config = load_config(tiny_models.make_config(tmp_path, source), ["data.packing=none", "lora.dropout=0.1"])
    _, model, adapter = set_up_model(config)
    assert model.get_submodule("model.layers.0.mlp.up_proj").lora_dropout["default"].p == 0.1
    config_to_save(adapter).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0
