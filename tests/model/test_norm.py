"""If this fails, the values or gradients of a fused norm differ from transformers'."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from qlora_dist.model import norm
from qlora_dist.model.norm import fuse_rms_norms


class Model(nn.Module):
    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.norm = original


def original_and_fused(kind: type[nn.Module], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    original = kind(24, 1e-5)
    original.weight = nn.Parameter(torch.randn(24).to(dtype), requires_grad=False)
    fused = Model(copy.deepcopy(original))
    fuse_rms_norms(fused)  # type: ignore[arg-type]
    assert type(fused.norm) is not kind and isinstance(fused.norm, kind)
    return original, fused.norm


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_equal_and_gradients_within_rounding(
    kind: type[nn.Module], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "_BLOCK", 4 * 24)  # several blocks, the last one shorter
    original, fused = original_and_fused(kind, dtype)
    x = torch.randn(2, 7, 24).to(dtype).transpose(0, 1).requires_grad_()
    grad = torch.randn(7, 2, 24).to(dtype)
    expected, actual = original(x), fused(x)
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(y, x, grad)[0] for y in (actual, expected)]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_only_the_input_is_saved() -> None:
    _, fused = original_and_fused(LlamaRMSNorm, torch.bfloat16)
    x = torch.randn(5, 24).bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        fused(x)
    assert sorted(t.shape for t in kept) == sorted([x.shape, fused.weight.shape, torch.Size([5, 1])])
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_a_trained_norm_runs_the_forward_of_its_class() -> None:
    original, fused = original_and_fused(LlamaRMSNorm, torch.float32)
    fused.weight.requires_grad_()
    x = torch.randn(3, 24)
    fused(x).square().sum().backward()
    original.weight.requires_grad_()
    original(x).square().sum().backward()
    assert torch.equal(fused.weight.grad, original.weight.grad)


def test_a_norm_that_differs_keeps_its_class() -> None:
    class HalfRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) / 2

    model = Model(HalfRMSNorm(8))
    fuse_rms_norms(model)  # type: ignore[arg-type]
    assert type(model.norm) is HalfRMSNorm


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma2", "phi3", "deepseek_v3", "mixtral"])
def test_norms_of_published_classes_are_fused(architecture: str) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    small = {"num_key_value_heads": 2, "vocab_size": 8, "head_dim": 8, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(architecture, **sizes, **small)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    fuse_rms_norms(model)
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    assert norms and all(type(module).__name__.startswith("Fused") for module in norms)


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden_states if gate is None else hidden_states * nn.functional.silu(gate))


class FailingRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise ValueError("only for four dimensions")


@pytest.mark.parametrize("kind", [GatedRMSNorm, FailingRMSNorm, Qwen3NextRMSNormGated, BambaRMSNormGated])
def test_a_norm_with_more_arguments_or_a_failing_probe_keeps_its_class(kind: type[nn.Module]) -> None:
    model = Model(kind(8, 8) if kind is BambaRMSNormGated else kind(8))
    fuse_rms_norms(model)  # type: ignore[arg-type]
    assert type(model.norm) is kind


def test_modules_of_a_class_with_other_settings_are_probed_separately() -> None:
    class ScaledRMSNorm(LlamaRMSNorm):
        factor = 1.0

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * self.factor

    plain, doubled, bare = ScaledRMSNorm(8), ScaledRMSNorm(8), ScaledRMSNorm(8)
    doubled.factor = 2.0
    bare.weight = None
    fuse_rms_norms(nn.ModuleList([plain, doubled, bare]))  # type: ignore[arg-type]
    assert type(plain) is not ScaledRMSNorm
    assert type(doubled) is type(bare) is ScaledRMSNorm
