"""If this fails, a 4-bit layer differs from bitsandbytes', or gathered weights stay in memory."""

from __future__ import annotations

import gc
import weakref

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qlora_dist.layers.linear import QuantizedLinear
from qlora_dist.nf4.quantize import dequantize_weight, quantize_weight


def make_weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def make_layer(
    shape: tuple[int, int], dtype: torch.dtype = torch.float32, *, bias: bool = True, **options: object
) -> QuantizedLinear:
    packed, layout = quantize_weight(make_weight(shape).to(dtype), **options)
    layer = QuantizedLinear(layout, bias=bias, bias_dtype=dtype)
    with torch.no_grad():
        layer.packed.copy_(packed)
        if layer.bias is not None:
            layer.bias.normal_()
    return layer


@settings(deadline=None, max_examples=50)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 130)),
    batch=st.sampled_from([(1,), (5,), (2, 3), ()]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    double_quant=st.booleans(),
)
def test_forward_and_backward_equal_the_dequantized_weights(shape, batch, bias, dtype, double_quant):
    layer = make_layer(shape, dtype, bias=bias, double_quant=double_quant)
    weight = dequantize_weight(layer.packed, layer.layout, dtype)
    x = torch.randn(*batch, shape[1]).to(dtype)
    actual_x, reference_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(actual_x), nn.functional.linear(reference_x, weight, layer.bias)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.equal(actual_x.grad, grad @ weight)
    expected.backward(grad)
    torch.testing.assert_close(actual_x.grad, reference_x.grad)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_it_equals_bitsandbytes_linear4bit(quant_type, double_quant):
    weight = make_weight((48, 128))
    layer = make_layer((48, 128), quant_type=quant_type, double_quant=double_quant)
    reference = bnb.nn.Linear4bit(128, 48, compute_dtype=torch.float32)
    reference.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=quant_type, compress_statistics=double_quant
    ).to("cpu")
    reference.bias = nn.Parameter(layer.bias.clone(), requires_grad=False)
    x = torch.randn(2, 7, 128)
    results = []
    for module in (layer, reference.train()):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        (y * torch.linspace(-1, 1, 48)).sum().backward()
        results.append((y, inputs.grad))
    (y, grad), (reference_y, reference_grad) = results
    assert torch.equal(y, reference_y)
    assert torch.equal(grad, reference_grad)


def live_tensors() -> dict[int, torch.Tensor]:
    gc.collect()
    return {id(value): value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)}


def test_forward_saves_no_tensors_for_backward():
    layer = make_layer((48, 130))
    x = torch.randn(3, 130, requires_grad=True)
    layer(x)  # the code tables are made at first use, and stay
    saved: list[torch.Tensor] = []
    before = set(live_tensors())
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    new = [tuple(tensor.shape) for key, tensor in live_tensors().items() if key not in before and tensor is not y]
    assert not saved
    assert not new


def test_backward_reads_the_bytes_that_are_gathered_again():
    # an engine frees the gathered bytes after forward and gathers them again for backward
    layer = make_layer((48, 130))
    x = torch.randn(3, 130, requires_grad=True)
    y = layer(x)
    gathered = weakref.ref(layer.packed)
    content = layer.packed.detach().clone()
    layer.packed = nn.Parameter(torch.zeros(0, dtype=torch.uint8), requires_grad=False)
    assert gathered() is None, "something keeps the bytes"
    layer.packed = nn.Parameter(content, requires_grad=False)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 48) @ layer.dequantize(torch.float32))


def test_parameters_are_frozen_bytes():
    layer = make_layer((48, 130)).requires_grad_(False)
    assert {name: (p.dtype, p.requires_grad) for name, p in layer.named_parameters()} == {
        "packed": (torch.uint8, False),
        "bias": (torch.float32, False),
    }
    assert layer.packed.shape == (layer.layout.total_bytes,)
    assert not QuantizedLinear(layer.layout, bias=True).bias.requires_grad
    assert QuantizedLinear(layer.layout, device="meta").packed.is_meta
    assert QuantizedLinear(layer.layout).bias is None


def test_casting_a_model_leaves_the_bytes_alone():
    layer = make_layer((48, 130))
    before = layer.packed.clone()
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.packed, before)


def test_gradient_by_differences():
    layer = make_layer((6, 9), dtype=torch.float32)
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    layer.bias.data = layer.bias.double()
    assert torch.autograd.gradcheck(layer, x)
