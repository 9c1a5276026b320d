"""If this fails, a model whose embedding and head are in 4 bit is trained on another loss than its weights give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from qlora_dist.config.config_file import load_config
from qlora_dist.layers.embedding import QuantizedEmbedding, QuantizedHead
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.runs.run_dir import run_path
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.architectures import dequantized_model, make_architecture
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import first_loss, losses

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "rows that end within a block": ("Llama", {"hidden_size": 96, "head_dim": 24}),
}


def train_on(ranks: int, path: Path, name: str, *overrides: str) -> list[float]:
    config = load_config(path, [f"run.name={name}-{ranks}", f"train.micro_batch={12 // ranks}", *overrides])
    run_ranks(ranks, run_training, config)
    return losses(config)


def check(source: Path, tmp_path: Path) -> None:
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions(embeddings=True)).out
    path = tiny_models.make_config(tmp_path, quantized, train__steps=2, optim__warmup_steps=0)
    from_16_bit = (f"model.base={source}", "model.embeddings=4bit")
    one = train_on(1, path, "folder")
    assert len(one) == 2
    assert train_on(2, path, "folder") == pytest.approx(one, rel=1e-5)
    assert train_on(2, path, "on-loading", *from_16_bit) == pytest.approx(one, rel=1e-5)
    in_4_bit, in_16_bit = dequantized_model(source, quantized, embeddings=True), dequantized_model(source, quantized)
    config = load_config(path)
    assert one[0] == pytest.approx(first_loss(config, in_4_bit), rel=1e-5)
    assert one[0] != pytest.approx(first_loss(config, in_16_bit), rel=1e-4)  # else the test proves nothing
    adapter = peft.PeftConfig.from_pretrained(run_path(config.run).parent / "folder-2" / "adapter")
    assert not {"lm_head", "embed_tokens"} & set(adapter.target_modules)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_losses_equal_the_dequantized_weights(name: str, tmp_path: Path) -> None:
    arch, settings = MODELS[name]
    check(tiny_models.make_model(tmp_path / "source", arch, torch.float32, initializer_range=0.1, **settings), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma2", "GPT2", "Cohere"])
def test_other_architectures_too(name: str, tmp_path: Path) -> None:
    """The models have a scaled embedding and a soft cap, position embeddings, a factor, and other names."""
    check(make_architecture(tmp_path / "source", name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_4_bit_folder_whose_embeddings_are_in_16_bit(ranks: int, tmp_path: Path) -> None:
    """Most published folders are like this. The embeddings are quantized while they are loaded."""
    source = tiny_models.make_model(tmp_path / "source")
    path = tiny_models.make_config(tmp_path, source, train__steps=3)
    whole = quantize_folder(source, tmp_path / "whole", QuantizeOptions(embeddings=True)).out
    layers = quantize_folder(source, tmp_path / "layers", QuantizeOptions()).out
    expected = train_on(1, path, "whole", f"model.base={whole}")
    trained = train_on(ranks, path, "layers", f"model.base={layers}", "model.embeddings=4bit")
    assert trained == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_head_that_others_have_quantized(tmp_path: Path) -> None:
    source = tiny_models.make_model(tmp_path / "source", intermediate_size=192)
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["nothing"],
    )
    published = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=options, dtype=torch.bfloat16, device_map="cpu"
    )
    published.save_pretrained(tmp_path / "published")
    tiny_models.make_tokenizer().save_pretrained(tmp_path / "published")
    assert "lm_head.weight" in ModelFolder(tmp_path / "published").quantized
    path = tiny_models.make_config(tmp_path, tmp_path / "published", train__steps=2, optim__warmup_steps=0)
    config = load_config(path)
    model = set_up_run(config, read_rank_info({})).model
    assert isinstance(model.get_output_embeddings(), QuantizedHead)
    assert not isinstance(model.get_input_embeddings(), QuantizedEmbedding)

    one = train_on(1, path, "run")
    assert train_on(2, path, "run") == pytest.approx(one, rel=1e-5)
    whole = quantize_folder(source, tmp_path / "nf4", QuantizeOptions(embeddings=True)).out
    expected = dequantized_model(source, whole, embeddings=True)
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected.model.embed_tokens.weight.data = original.model.embed_tokens.weight.data
    assert one[0] == pytest.approx(first_loss(config, expected), rel=1e-5)
