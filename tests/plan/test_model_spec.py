"""If this fails, the planner's model differs from the one that is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_dist.config.schema import Config
from qlora_dist.plan.model_spec import make_model_spec
from qlora_dist.plan.run_spec import make_run_spec
from qlora_dist.train.run_setup import set_up_model
from tests.helpers.architectures import make_architecture
from tests.helpers.planned_parameters import compare_parameters

# settings of config.json and of LoRA that change parameters, for each supported architecture
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Llama", {"attention_bias": True, "mlp_bias": True}, {"targets": ["q_proj", "down_proj"]}),
    ("Llama", {"tie_word_embeddings": True}, {"dora": True}),
    ("Mistral", {}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("Qwen2", {"tie_word_embeddings": False}, {}),
    ("Qwen3", {"attention_bias": True}, {}),
    ("Gemma2", {}, {}),
    ("Mixtral", {}, {"experts": True, "dropout": 0.0}),
    ("Qwen3Moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}, {}),
    ("Qwen3Moe", {}, {}),
    ("DeepseekV3", {}, {}),
    ("DeepseekV3", {"q_lora_rank": None}, {"targets": ["q_proj", "o_proj"]}),
]


@pytest.mark.parametrize(("name", "settings", "lora"), CASES, ids=lambda value: str(value))
def test_shapes_equal_the_trained_models(
    name: str, settings: dict[str, Any], lora: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_architecture(tmp_path, name, torch.bfloat16, **settings)
    packing = "none" if name == "Gemma2" else "best-fit"
    config = Config.model_validate(
        {"model": {"base": str(folder)}, "lora": {"r": 4, **lora}, "data": {"train": ["none"], "packing": packing}}
    )
    _, model, _ = set_up_model(config)
    planned = make_model_spec(json.loads((folder / "config.json").read_text()), config.lora)
    compare_parameters(planned, model)
    assert planned.buffer_bytes == sum(buffer.nbytes for buffer in model.buffers())


@pytest.mark.parametrize("modules_to_save", [[], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens(tied: bool, modules_to_save: list[str], tmp_path: Path) -> None:
    folder = make_architecture(tmp_path, "Llama", torch.bfloat16, vocab_size=305, tie_word_embeddings=tied)
    lora = {"modules_to_save": ["embed_tokens"] if tied and modules_to_save else modules_to_save}
    config = Config.model_validate(
        {"model": {"base": str(folder), "add_tokens": ["<a>", "<b>"]}, "lora": lora, "data": {"train": ["none"]}}
    )
    _, model, _ = set_up_model(config)
    compare_parameters(make_run_spec(config, json.loads((folder / "config.json").read_text()), 1).model, model)
