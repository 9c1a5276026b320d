"""If this fails, the text of a multimodal model is trained on a wrong loss, or its other parts are changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import save_file

from qlora_dist.adapters.attach import make_peft_config
from qlora_dist.config.config_file import load_config
from qlora_dist.config.sections import LoraConfig, ModelConfig
from qlora_dist.errors import UserError
from qlora_dist.model.language_model import find_decoder, remove_towers
from qlora_dist.model.meta_model import build_meta_model
from qlora_dist.model.model_class import causal_lm_on_meta, whole_model_on_meta
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_folder import print_quantize_report, quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.plan.model_config import read_model_config
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_run
from tests.helpers import tiny_models
from tests.helpers.multimodal_models import (
    MULTIMODAL,
    dequantized_multimodal,
    load_tensors,
    make_multimodal,
    open_multimodal,
)
from tests.helpers.train_helpers import first_loss, losses, train_and_get_logits

TOWERS = {
    "gemma3": ["model.multi_modal_projector", "model.vision_tower"],
    "llama4": ["multi_modal_projector", "vision_model"],
    "mistral3": ["model.multi_modal_projector", "model.vision_tower"],
    "llava_next": ["model.image_newline", "model.multi_modal_projector", "model.vision_tower"],
    "qwen3_vl": ["model.visual"],
}

pytestmark = pytest.mark.slow


def make_config_folder(folder: Path, config: transformers.PretrainedConfig) -> ModelFolder:
    """Save a configuration with a tensor that no model has."""
    config.save_pretrained(folder)
    save_file({"unknown": torch.zeros(2)}, folder / "model.safetensors")
    return ModelFolder(folder)


@pytest.mark.parametrize("name", ["gemma3", "llama4", "mistral3", "llava_next"])
def test_quantize_leaves_the_towers_as_they_are(name: str, tmp_path: Path) -> None:
    source = make_multimodal(tmp_path / "source", name, torch.bfloat16)
    report = quantize_folder(source, tmp_path / "nf4", QuantizeOptions(min_share=0.95))
    before, after = load_tensors(source), load_tensors(report.out)
    in_4_bit = {key.rpartition(".absmax")[0] for key in after if key.endswith(".absmax")}
    assert in_4_bit and all(("language_model" in key) for key in in_4_bit)
    in_towers = [key for key in before if any(part in key for part in ("vision", "projector", "image_newline"))]
    assert in_towers and all(torch.equal(before[key], after[key]) for key in in_towers)
    assert report.counts.towers == sum(before[key].numel() for key in in_towers)
    assert report.counts.unused == 0

    quantization = json.loads((report.out / "config.json").read_text())["quantization_config"]
    assert {*quantization["llm_int8_skip_modules"]} >= {*TOWERS[name], "lm_head"}
    console = Console(record=True, width=200)
    print_quantize_report(report, console)
    line = f"copied, because only text is trained: {', '.join(report.plan.towers)} ({report.counts.towers:,})"
    assert sorted(report.plan.towers) == TOWERS[name] and line in console.export_text()


def test_transformers_opens_the_4_bit_folder(tmp_path: Path) -> None:
    source = make_multimodal(tmp_path / "source", "mistral3", torch.bfloat16)
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions()).out
    model = open_multimodal(quantized)
    in_4_bit = {path for path, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    linear = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert in_4_bit == {path for path in linear if path.startswith("model.language_model.")}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_meta_model_has_the_language_model_alone_under_its_own_names(name: str, tmp_path: Path) -> None:
    config = transformers.CONFIG_MAPPING[name](**MULTIMODAL[name])
    folder = make_config_folder(tmp_path, config)
    whole, model = (build(folder, torch.float32) for build in (whole_model_on_meta, causal_lm_on_meta))
    expected = dict(whole.named_parameters())
    decoder = next(path for path, module in whole.named_modules() if module is find_decoder(whole))
    names = {key for key in expected if key.startswith((f"{decoder}.", "lm_head.", "language_model.lm_head."))}
    assert {key: p.shape for key, p in model.named_parameters()} == {key: expected[key].shape for key in names}
    towers = remove_towers(whole)
    assert {key for key in expected if towers.holds(key)} == expected.keys() - names
    assert expected.keys() - names == {key for key in towers.names if key in expected}


@pytest.mark.parametrize("name", ["gemma3", "llama4", "mistral3", "llava_next", "qwen3_vl"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_peft_adapts_the_language_model_alone(name: str, targets: Any, tmp_path: Path) -> None:
    source = make_multimodal(tmp_path / "source", name)
    model = build_meta_model(ModelFolder(source), ModelConfig(base=str(source)))
    config = make_peft_config(model, LoraConfig(r=4, targets=targets, dropout=0.0), str(source), model.towers.names)
    whole = whole_model_on_meta(ModelFolder(source), torch.float32)
    with torch.device("meta"):
        adapted = peft.get_peft_model(whole, config)
    found = {key.partition(".lora_A")[0] for key, _ in adapted.named_parameters() if ".lora_A." in key}
    linear = {path for path, module in whole.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    wanted = wanted if targets == "all-linear" else set(targets)
    paths = {path.removeprefix("base_model.model.") for path in found}
    assert paths and all("language_model" in path and path.rpartition(".")[2] in wanted for path in paths)
    assert len(paths) == len({p for p in linear | paths if "language_model" in p and p.rpartition(".")[2] in wanted})


def test_the_first_loss_equals_that_of_transformers_own_class(tmp_path: Path) -> None:
    source = make_multimodal(tmp_path / "source", "mistral3")
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions()).out
    path = tiny_models.make_config(tmp_path, quantized, train__steps=1, train__global_batch=4, optim__warmup_steps=0)
    config = load_config(path, ["train.micro_batch=4"])
    setup = set_up_run(config, read_rank_info({}))
    assert setup.model.config.get_text_config()._attn_implementation == "qlora_packed"
    plain = dequantized_multimodal(source, quantized, tmp_path / "plain")
    train_and_get_logits(config)
    assert losses(config)[0] == pytest.approx(first_loss(config, plain), rel=1e-6)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            lambda: transformers.MllamaConfig(),
            "a model of type mllama attends to the states of an encoder, which cannot be trained here; give another",
        ),
        (
            lambda: transformers.GitConfig(),
            "a model of type git has no language model apart from its images or sounds, which cannot be trained here",
        ),
        (
            lambda: transformers.Qwen2AudioConfig(),
            "a model of type qwen2_audio cannot run on text without its towers .*, so that its text cannot be trained",
        ),
    ],
)
def test_a_model_whose_text_cannot_be_trained_is_refused(config: Any, reason: str, tmp_path: Path) -> None:
    folder = make_config_folder(tmp_path, config())
    with pytest.raises(UserError, match=reason):
        causal_lm_on_meta(folder, torch.bfloat16)


def test_a_class_that_adds_something_to_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_config_folder(tmp_path, transformers.Gemma3Config(**MULTIMODAL["gemma3"]))
    model_class = transformers.models.gemma3.modeling_gemma3.Gemma3Model
    forward = model_class.forward

    def scaled(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return forward(self, **kwargs | {"inputs_embeds": 2 * self.get_input_embeddings()(input_ids)})

    def both_ways(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return forward(self, input_ids, **kwargs | {"token_type_ids": torch.ones_like(input_ids)})

    for changed, reason in ((scaled, "changes the embeddings of the tokens"), (both_ways, "lets a token see later")):
        monkeypatch.setattr(model_class, "forward", changed)
        with pytest.raises(UserError, match=f"a model of type gemma3 {reason}.*, so that its text cannot be trained"):
            causal_lm_on_meta(folder, torch.bfloat16)


def test_the_plan_reads_the_language_model_of_a_nested_config(tmp_path: Path) -> None:
    transformers.Qwen3VLConfig(**MULTIMODAL["qwen3_vl"]).save_pretrained(tmp_path)
    config = read_model_config(str(tmp_path))
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == ("qwen3", 64, 2)
