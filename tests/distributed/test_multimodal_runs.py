"""If this fails, an adapter of a multimodal model's text is wrong on several ranks, or does not fit the whole model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from qlora_dist.config.config_file import load_config
from qlora_dist.config.lora_from_adapter import fill_lora_from_adapter
from qlora_dist.config.schema import Config
from qlora_dist.config.sections import LoraConfig
from qlora_dist.inference.generate import SamplingOptions, generate_tokens
from qlora_dist.inference.inference_model import open_inference_model
from qlora_dist.inference.named_adapter import read_named_adapter
from qlora_dist.merge.merge_folder import merge_folder
from qlora_dist.merge.merge_plan import MergeOptions
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.runs.run_dir import run_path
from tests.helpers import tiny_models
from tests.helpers.multimodal_models import dequantized_multimodal, make_multimodal, open_multimodal
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import PROMPT, first_loss, losses, train_and_get_logits

TYPES = ["gemma3", "llama4", "mistral3", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"]
CASES = [*((name, False) for name in TYPES), ("llama4", True), ("qwen3_vl_moe", True), ("qwen3_5_moe", True)]


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=PROMPT, use_cache=False).logits
    return logits


@pytest.mark.slow
@pytest.mark.parametrize(("name", "experts"), CASES)
def test_text_trains_as_in_transformers_own_class(name: str, experts: bool, tmp_path: Path) -> None:
    source = make_multimodal(tmp_path / "source", name)
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions()).out
    path = tiny_models.make_config(tmp_path, quantized, train__steps=2, optim__warmup_steps=0)
    packing = "none" if name.startswith("qwen3_5") else "best-fit"
    overrides = [f"data.packing={packing}", f"lora.experts={str(experts).lower()}"]
    configs = [load_config(path, [f"run.name={n}-ranks", f"train.micro_batch={12 // n}", *overrides]) for n in (1, 2)]
    one, two = (run_ranks(n, train_and_get_logits, config)[0] for n, config in enumerate(configs, 1))
    assert losses(configs[1]) == pytest.approx(losses(configs[0]), rel=1e-5)
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)

    plain = dequantized_multimodal(source, quantized, tmp_path / "plain")
    assert losses(configs[0])[0] == pytest.approx(first_loss(configs[0], plain), rel=1e-5)
    base, adapter = logits_of(plain), run_path(configs[1].run) / "adapter"
    model = peft.PeftModel.from_pretrained(plain, adapter).eval()
    assert_same_tensors(model, adapter)
    logits = logits_of(model)
    torch.testing.assert_close(torch.from_numpy(two), logits, rtol=1e-3, atol=1e-4)
    assert (logits - base).abs().max() > 20 * np.abs(one - two).max()  # the adapter matters

    merge_folder(quantized, adapter, tmp_path / "merged", MergeOptions(dtype="fp32"), Console(quiet=True))
    torch.testing.assert_close(logits_of(open_multimodal(tmp_path / "merged")), logits, rtol=1e-4, atol=1e-4)


def assert_same_tensors(model: peft.PeftModel, adapter: Path) -> None:
    """Check that PEFT has the adapter's matrices and no others."""
    saved = load_file(adapter / "adapter_model.safetensors")
    loaded = {key: tensor for key, tensor in model.named_parameters() if ".lora_" in key}
    assert sum(t.numel() for t in saved.values()) == sum(t.numel() for t in loaded.values())
    assert all(tensor.any() for tensor in loaded.values())


@pytest.mark.slow
def test_a_run_continues_an_adapter_and_generates_with_it(tmp_path: Path) -> None:
    source = make_multimodal(tmp_path / "source", "gemma3")
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions()).out
    path = tiny_models.make_config(tmp_path, quantized, train__steps=2, optim__warmup_steps=0, optim__lr=1e-4)
    modules = "lora.modules_to_save=[embed_tokens]"
    first = load_config(path, ["run.name=first", modules])
    run_ranks(2, train_and_get_logits, first)
    adapter = run_path(first.run) / "adapter"
    continued = load_config(path, ["run.name=second", f"lora.from={adapter}"])
    second = fill_lora_from_adapter(continued.model_copy(update={"lora": LoraConfig(from_adapter=str(adapter))}))
    (logits, *_) = run_ranks(2, train_and_get_logits, second)

    plain = dequantized_multimodal(source, quantized, tmp_path / "plain")
    model = peft.PeftModel.from_pretrained(plain, run_path(second.run) / "adapter").eval()
    torch.testing.assert_close(torch.from_numpy(logits), logits_of(model), rtol=1e-3, atol=1e-4)
    earlier, later = (load_file(run_path(c.run) / "adapter/adapter_model.safetensors") for c in (first, second))
    assert earlier.keys() == later.keys() and any("embed_tokens" in key for key in later)
    difference = sum(float((earlier[key] - later[key]).square().sum()) for key in later)
    assert 0 < difference < 0.01 * sum(float(tensor.square().sum()) for tensor in later.values())

    expected = model.generate(input_ids=PROMPT, max_new_tokens=5, do_sample=False)[0, PROMPT.shape[1] :].tolist()
    answers = run_ranks(2, generate_after_prompt, second)
    assert answers[0] and answers == [expected[: len(answers[0])]] * 2


def generate_after_prompt(config: Config) -> list[int]:
    adapter = read_named_adapter(run_path(config.run) / "adapter", "text")
    with open_inference_model(config, [adapter]) as loaded:
        (answer,) = generate_tokens(loaded, [PROMPT[0].tolist()], SamplingOptions(max_new_tokens=5, temperature=0))
    return answer
