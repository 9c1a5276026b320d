"""If this fails, a sharded model generates another text than a whole one, or than transformers with PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.inference.generate import SamplingOptions, generate_tokens
from qlora_dist.inference.inference_config import inference_config
from qlora_dist.inference.inference_model import open_inference_model
from qlora_dist.inference.named_adapter import common_base, parse_named_adapters
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from tests.helpers.architectures import dequantized_model, make_architecture
from tests.helpers.ranks import run_ranks

PROMPTS = [[5, 6, 7], [3, 4, 5, 6, 7, 8, 9], [40, 41], [50, 51, 52, 53, 54], [60]]
GREEDY = SamplingOptions(max_new_tokens=8, temperature=0.0)
FP32 = ("train.device=cpu", "model.compute_dtype=fp32")


def generate_answers(given: list[str], prompts: list[list[int]], batch_size: int) -> dict[str, Any]:
    """Generate greedily with each adapter and with the base, and sample with two seeds."""
    adapters = parse_named_adapters(given)
    answers: dict[str, Any] = {}
    with open_inference_model(
        inference_config(common_base(adapters), adapters[0].path, overrides=FP32), adapters
    ) as loaded:
        for name in (*loaded.adapter_names, None):
            loaded.set_adapter(name)
            answers[name or "base"] = generate_tokens(loaded, prompts, GREEDY, batch_size=batch_size)
        loaded.set_adapter(loaded.adapter_names[0])  # and back again
        for seed in (3, 4):
            sampling = SamplingOptions(max_new_tokens=6, temperature=1.0, top_k=50, seed=seed)
            answers[f"seed {seed}"] = generate_tokens(loaded, prompts, sampling, batch_size=batch_size)
    return answers


def test_texts_equal_those_from_transformers_and_peft(material: Any, plain_model: Callable[[Path], Any]) -> None:
    """Two adapters and the base decode greedily prompts of different lengths, in more batches than ranks."""
    given = [f"one={material.first_adapter}", f"two={material.second_adapter}"]
    model = peft.PeftModel.from_pretrained(plain_model(material.base), material.first_adapter, adapter_name="one")
    model.load_adapter(material.second_adapter, adapter_name="two")

    def plain(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=2
            )
        tokens = output[0, len(prompt) :].tolist()
        return tokens[: tokens.index(2)] if 2 in tokens else tokens

    expected: dict[str, Any] = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        expected[name] = [plain(prompt) for prompt in PROMPTS]
    with model.disable_adapter():
        expected["base"] = [plain(prompt) for prompt in PROMPTS]
    assert expected["one"] != expected["two"] != expected["base"] != expected["one"]
    (alone,) = run_ranks(1, generate_answers, given, PROMPTS, 2)
    assert {name: alone[name] for name in expected} == expected
    assert alone["seed 3"] != alone["seed 4"]
    assert run_ranks(2, generate_answers, given, PROMPTS, 2) == [alone] * 2  # samples depend on the seed alone


def test_a_base_that_stays_in_16_bit(material: Any, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    """The sharded model has PEFT's own DoRA layers and a head that was trained whole."""
    settings: dict[str, Any] = {
        "use_dora": True,
        "target_modules": ["q_proj", "up_proj"],
        "modules_to_save": ["lm_head"],
    }
    adapter = make_adapter(tmp_path / "adapter", material.source, seed=3, **settings)
    plain = transformers.AutoModelForCausalLM.from_pretrained(material.source, dtype=torch.float32)
    ids = torch.tensor(PROMPTS[1:2])
    with torch.no_grad():
        base = plain.eval()(input_ids=ids, use_cache=False).logits
        expected = peft.PeftModel.from_pretrained(plain, adapter).eval()(input_ids=ids, use_cache=False).logits
    for result in run_ranks(2, logits, str(adapter), PROMPTS[1:2]):
        torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 0.1


def logits(adapter: str, prompts: list[list[int]]) -> Any:
    adapters = parse_named_adapters([adapter])
    with open_inference_model(
        inference_config(common_base(adapters), overrides=FP32), adapters, quantize=False
    ) as loaded:
        with torch.no_grad():
            result = loaded.model(input_ids=torch.tensor(prompts), use_cache=False).logits
        loaded.set_adapter(None)
        return result.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2", "Gemma2", "GptOss", "Mamba"])
def test_left_padding_changes_no_token(name: str, tmp_path: Path) -> None:
    """A batch equals single prompts with learned positions, a soft cap with windows, sinks, and a state space."""
    source = make_architecture(tmp_path / "source", name, **({"tie_word_embeddings": True} if name == "Mamba" else {}))
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions(min_share=0.2)).out
    prompts, plain, expected = [list(range(3, 43)), *PROMPTS[:2]], dequantized_model(source, quantized).eval(), []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = plain.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=2, eos_token_id=319)
        expected.append(output[0, len(prompt) :].tolist())
    (answers,) = run_ranks(1, generate_in_one_batch, str(quantized), prompts)
    assert answers == expected


def generate_in_one_batch(base: str, prompts: list[list[int]]) -> list[list[int]]:
    with open_inference_model(inference_config(base, overrides=FP32)) as loaded:
        return generate_tokens(loaded, prompts, SamplingOptions(max_new_tokens=6, temperature=0.0))


@pytest.mark.slow
def test_smollm2_generates_on_two_ranks_as_on_one(smollm2_folder: Path, tmp_path: Path) -> None:
    """The model has tied embeddings and an adapter, and is quantized while it is loaded."""
    adapter = random_adapter(smollm2_folder, tmp_path / "adapter")
    tokenizer = load_tokenizer(smollm2_folder)
    prompts = [tokenizer(text)["input_ids"] for text in ("The capital of France is", "Once upon a", "def main():\n")]
    (alone,) = run_ranks(1, generate_in_two_batches, str(adapter), prompts)
    assert run_ranks(2, generate_in_two_batches, str(adapter), prompts) == [alone] * 2
    assert " Paris" in tokenizer.decode(alone[0])


def generate_in_two_batches(adapter: str, prompts: list[list[int]]) -> list[list[int]]:
    adapters = parse_named_adapters([adapter])
    with open_inference_model(inference_config(common_base(adapters), overrides=FP32), adapters) as loaded:
        return generate_tokens(loaded, prompts, SamplingOptions(max_new_tokens=4, temperature=0.0), batch_size=2)


def random_adapter(base: Path, out: Path) -> Path:
    """Write a random adapter so small that the model still generates sense."""
    config = json.loads((base / "config.json").read_text())
    hidden, r = config["hidden_size"], 4
    torch.manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors |= {
            f"{name}.lora_A.weight": 0.02 * torch.randn(r, hidden),
            f"{name}.lora_B.weight": 0.02 * torch.randn(hidden, r),
        }
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (out / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    return out
