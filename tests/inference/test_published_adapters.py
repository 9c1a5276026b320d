"""If this fails, an adapter that others have published computes something else here than in PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora_dist.inference.inference_config import inference_config
from qlora_dist.inference.inference_model import open_inference_model
from qlora_dist.inference.named_adapter import common_base, parse_named_adapters
from tests.helpers.train_helpers import PROMPT


def change_config(adapter: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def as_in_2023(config: dict[str, Any]) -> dict[str, Any]:
    """Keep the keys that PEFT 0.4 wrote."""
    kept = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout")
    kept += ("modules_to_save", "peft_type", "r", "target_modules", "task_type")
    return {key: config[key] for key in kept}


def as_bf16(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, tuple[dict[str, Any], Callable[[Path], object]]] = {
    "a configuration of 2023": ({"target_modules": ALL}, lambda adapter: change_config(adapter, as_in_2023)),
    "keys of a later PEFT": (
        {"target_modules": ALL},
        lambda adapter: change_config(adapter, lambda config: config | {"a_new_key": None, "peft_version": "9.0"}),
    ),
    "a regular expression": ({"target_modules": r".*\.(0|2)\.(self_attn|mlp)\.(q_proj|down_proj)"}, lambda _: None),
    "ranks by pattern": (
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"v_proj": 3},
        },
        lambda _: None,
    ),
    "some layers": ({"target_modules": ALL, "layers_to_transform": [1], "layers_pattern": "layers"}, lambda _: None),
    "rsLoRA and DoRA": ({"target_modules": ALL, "use_rslora": True, "use_dora": True}, lambda _: None),
    "head and embedding": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        lambda _: None,
    ),
    "tensors in bf16": ({"target_modules": ALL}, as_bf16),
}


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_an_adapter_of_others_equals_pefts(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    settings, change = ADAPTERS[kind]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    model.peft_config["default"].base_model_name_or_path = str(tiny_llama)
    model.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        base = plain(input_ids=PROMPT).logits
        expected = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(input_ids=PROMPT).logits
    assert (expected - base).abs().max() > 0.01
    adapters = parse_named_adapters([str(tmp_path / "adapter")])
    overrides = ("train.device=cpu", "model.compute_dtype=fp32")
    config = inference_config(common_base(adapters), tmp_path / "adapter", overrides=overrides)
    with open_inference_model(config, adapters, quantize=False) as loaded, torch.no_grad():
        actual = loaded.model(input_ids=PROMPT, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
