"""If this fails, rows of new tokens begin with other values than transformers gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.new_token_rows import folder_rows
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.nf4.quantize import dequantize_weight, quantize_weight
from tests.helpers import tiny_models

CPU = torch.device("cpu")
NAMES = ("model.embed_tokens.weight", "lm_head.weight")


def resized_rows(model: Any, name: str, rows: int, seed: int) -> torch.Tensor:
    """Return the added rows of one matrix, by transformers itself."""
    old = model.get_submodule(name.removesuffix(".weight"))
    new = nn.Linear(old.weight.shape[1], rows, bias=False, dtype=old.weight.dtype)
    torch.manual_seed(seed)
    model._init_added_embeddings_weights_with_mean(old, new, 300, rows - 300)
    return new.weight.detach()[300:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_size", [64, 512])
def test_values_equal_transformers(dtype: torch.dtype, hidden_size: int, tmp_path: Path) -> None:
    """With 64 columns the covariance is positive definite; with 512, more than rows, the mean is taken."""
    base = tiny_models.make_model(
        tmp_path / "base", dtype=dtype, vocab_size=300, hidden_size=hidden_size, num_hidden_layers=1
    )
    tensors = load_file(base / "model.safetensors")
    for name in NAMES:  # means that are not near zero, and correlated columns
        tensors[name] = (tensors[name].float().cumsum(dim=1) + torch.linspace(-1, 1, hidden_size)).to(dtype)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    for name in NAMES:
        generator = torch.Generator().manual_seed(5)
        values = folder_rows(ModelFolder(base), name, [7, 300, 301, 302], generator, CPU)
        assert torch.equal(values[0], tensors[name][7].float()), "a row of the folder keeps its value"
        expected = resized_rows(model, name, 303, seed=5).float()
        mean = tensors[name].float().mean(dim=0)
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 0.0}
        torch.testing.assert_close(values[1:], expected, **tolerance)
        if dtype == torch.float32:
            noise, expected_noise = values[1:] - mean, expected - mean
            is_sampled = hidden_size == 64
            assert bool(expected_noise.abs().max() > 2e-6) == is_sampled
            if is_sampled:
                torch.testing.assert_close(noise, expected_noise, rtol=0.05, atol=1e-6)


def test_values_from_a_4_bit_embedding(tmp_path: Path) -> None:
    source = tiny_models.make_model(tmp_path / "base", dtype=torch.float32, vocab_size=300, num_hidden_layers=1)
    options = QuantizeOptions(embeddings="4bit", min_share=0.3)
    quantized = quantize_folder(source, tmp_path / "nf4", options).out
    weight = dequantize_weight(*quantize_weight(load_file(source / "model.safetensors")[NAMES[0]]), torch.float32)
    generator = torch.Generator().manual_seed(0)
    values = folder_rows(ModelFolder(quantized), NAMES[0], [299, 300], generator, CPU)
    assert torch.equal(values[0], weight[299])
    torch.testing.assert_close(values[1], weight.mean(dim=0), rtol=1e-3, atol=1e-5)


def test_a_bias_of_the_head(tmp_path: Path) -> None:
    bias = torch.randn(300) + 3
    folder = tiny_models.make_model(tmp_path / "base", dtype=torch.float32, vocab_size=300, num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors") | {"lm_head.bias": bias}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    generator = torch.Generator().manual_seed(0)
    values = folder_rows(ModelFolder(folder), "lm_head.bias", range(300, 303), generator, CPU)
    torch.testing.assert_close(values, bias.mean().expand(3), rtol=1e-6, atol=0)
