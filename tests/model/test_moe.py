"""If this fails, experts in 4 bit give outputs or gradients that differ from transformers'."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from qlora_dist.layers.experts import QuantizedExperts
from qlora_dist.model.moe import is_moe_experts, replace_experts_forward
from qlora_dist.model.quantizable import EXPERT_WEIGHTS
from qlora_dist.nf4.quantize import dequantize_weight, quantize_weight
from tests.helpers.architectures import ARCHITECTURES, SETTINGS_OF_ALL

TOKENS, K = 7, 2


def make_experts(name: str) -> nn.Module:
    """Return the experts of the first sparse layer of a model with random weights."""
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Llama4" else f"{name}Config")
    config = config_class(**(SETTINGS_OF_ALL | ARCHITECTURES[name] | {"mlp_only_layers": []}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    experts = next(module for module in model.modules() if is_moe_experts(module))
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.2)
        parameter.requires_grad_(False)
    return experts


def quantized_experts(experts: nn.Module) -> nn.Module:
    """Return a copy with QuantizedExperts, and replace the weights of the original by the dequantized ones."""
    quantized = copy.deepcopy(experts)
    transposed = getattr(experts, "is_transposed", True)
    for name in EXPERT_WEIGHTS:
        weight = experts._parameters.get(name)
        if weight is None:
            continue
        packed = [quantize_weight(matrix.T if transposed else matrix) for matrix in weight]
        module = QuantizedExperts(packed[0][1], len(packed), 1)
        module.packed.data = torch.cat([vector for vector, _ in packed])
        delattr(quantized, name)
        setattr(quantized, name, module)
        for matrix, (vector, layout) in zip(weight, packed, strict=True):
            value = dequantize_weight(vector, layout, torch.float32)
            matrix.copy_(value.T if transposed else value)
    replace_experts_forward(quantized)
    return quantized


def outputs_and_gradients(experts: nn.Module, hidden: torch.Tensor, *routing: torch.Tensor) -> tuple[Any, Any]:
    inputs = hidden.clone().requires_grad_()
    output = experts(inputs, *routing)
    (grad,) = torch.autograd.grad(output, inputs, torch.linspace(-1, 1, output.numel()).view_as(output))
    return output, grad


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss"])
def test_experts_equal_transformers(name: str) -> None:
    experts = make_experts(name)
    quantized = quantized_experts(experts)
    hidden = torch.randn(TOKENS, SETTINGS_OF_ALL["hidden_size"])
    top_k_index = torch.rand(TOKENS, 3).topk(K).indices  # no token chooses expert 3
    routing = (top_k_index, torch.rand(TOKENS, K))
    actual, expected = (outputs_and_gradients(module, hidden, *routing) for module in (quantized, experts))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_an_index_past_the_last_expert_adds_nothing() -> None:
    quantized = quantized_experts(make_experts("Mixtral"))
    hidden, weights = torch.randn(TOKENS, 64), torch.rand(TOKENS, K)
    top_k_index = torch.tensor([[0, 1]]).repeat(TOKENS, 1)
    output, _ = outputs_and_gradients(quantized, hidden, top_k_index, weights)
    top_k_index[2, 1], top_k_index[3] = 4, 4
    changed, grad = outputs_and_gradients(quantized, hidden, top_k_index, weights)
    only_first, _ = outputs_and_gradients(quantized, hidden[2:3], top_k_index[2:3, :1], weights[2:3, :1])
    torch.testing.assert_close(changed[2], only_first[0])
    assert not changed[3].any() and not grad[3].any()
    torch.testing.assert_close(changed[4:], output[4:])


def test_llama4_experts_equal_transformers_and_skip_tokens_without_input() -> None:
    experts = make_experts("Llama4")
    quantized = quantized_experts(experts)
    hidden = torch.randn(4, TOKENS, 64)
    chosen = torch.arange(4)[:, None] == torch.arange(TOKENS) % 3  # each token is routed to one of three experts
    inputs = (hidden * chosen[..., None]).view(-1, 64)
    actual, grad = outputs_and_gradients(quantized, inputs)
    expected, expected_grad = outputs_and_gradients(experts, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    rows = chosen.flatten()
    torch.testing.assert_close(grad[rows], expected_grad[rows], rtol=1e-4, atol=1e-5)
    assert not grad[~rows].any()


def test_an_ordinary_layer_is_not_a_module_of_experts() -> None:
    assert not is_moe_experts(nn.Linear(4, 4))
