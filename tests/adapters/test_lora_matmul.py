"""If this fails, the adapter is trained with wrong gradients of its layer."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_dist.adapters import lora_matmul as fused
from qlora_dist.adapters.attach import attach_adapter, make_peft_config
from qlora_dist.adapters.lora import QuantizedLoraLinear
from qlora_dist.adapters.lora_matmul import lora_matmul
from qlora_dist.config.sections import LoraConfig
from qlora_dist.layers.linear import QuantizedLinear
from qlora_dist.nf4.quantize import quantize_weight

SCALING = 0.75


def make_layer(*, bias: bool = True) -> QuantizedLinear:
    torch.manual_seed(0)
    packed, layout = quantize_weight(torch.randn(48, 32))
    module = QuantizedLinear(layout, bias=bias, bias_dtype=torch.float32)
    module.packed.data = packed
    if module.bias is not None:
        module.bias.data.normal_()
    return module


def make_tensors(*, requires_grad: bool = True) -> list[torch.Tensor]:
    """Return x, A and B in fp32. Only x may lack a gradient."""
    torch.manual_seed(1)
    shapes = ((2, 5, 32), (4, 32), (48, 4))
    return [torch.randn(shape).requires_grad_(requires_grad or i > 0) for i, shape in enumerate(shapes)]


def autograd_output(
    base: QuantizedLinear, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dropped: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the layer's output in fp64 with plain operations."""
    weight, bias = base.dequantize(torch.float32).double(), base.bias
    y = nn.functional.linear(x, weight, bias.double() if bias is not None else None)
    return y + SCALING * ((x if dropped is None else dropped) @ a.T @ b.T)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_values_and_gradients(*, bias: bool, dropout: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)  # calls the operator without compiling it
    base, actual = make_layer(bias=bias), make_tensors()
    reference = [t.detach().double().requires_grad_() for t in actual]
    keep = (torch.rand(2, 5, 32) < 0.7) / 0.7
    y = lora_matmul(actual[0], base, *actual[1:], SCALING, actual[0] * keep if dropout else None)
    expected = autograd_output(base, *reference, reference[0] * keep.double() if dropout else None)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    reference_grads = torch.autograd.grad(expected, reference, grad.double())
    for a, b in zip(torch.autograd.grad(y, actual, grad), reference_grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_an_input_that_is_not_trained_gets_no_gradient(*, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    base, (x, a, b) = make_layer(), make_tensors(requires_grad=False)
    y = lora_matmul(x, base, a, b, SCALING)
    expected = torch.autograd.grad(autograd_output(base, x.double(), a.double(), b.double()).sum(), [a, b])
    monkeypatch.setattr(QuantizedLinear, "dequantize", None)  # the weight is not dequantized either
    monkeypatch.setattr(fused, "dequantize_weight", None)
    for actual, reference in zip(torch.autograd.grad(y.sum(), [a, b]), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)


def test_the_operator_passes_opcheck() -> None:
    base, (x, a, b) = make_layer(), make_tensors()
    arguments = (
        x.detach()[0].requires_grad_(),
        None,
        a,
        b,
        base.packed,
        base.bias,
        SCALING,
        *fused._layout_args(base.layout),
    )
    torch.library.opcheck(fused._lora_matmul_op, arguments)


def test_a_checkpointed_layer_dequantizes_its_last_weight_only_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    base, (x, a, b) = make_layer(), make_tensors()
    expected_grads = torch.autograd.grad(lora_matmul(x, base, a, b, SCALING).square().sum(), [x, a, b])
    calls, dequantize = [], QuantizedLinear.dequantize

    def counted(self: QuantizedLinear, dtype: torch.dtype) -> torch.Tensor:
        calls.append(dtype)
        return dequantize(self, dtype)

    monkeypatch.setattr(QuantizedLinear, "dequantize", counted)
    y = checkpoint(lambda x: lora_matmul(x, base, a, b, SCALING), x, use_reentrant=False)
    for actual, reference in zip(torch.autograd.grad(y.square().sum(), [x, a, b]), expected_grads, strict=True):
        torch.testing.assert_close(actual, reference)
    assert len(calls) == 2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_layer_computes_lora_and_can_be_disabled(dropout: float) -> None:
    model = nn.Sequential(make_layer())
    config = make_peft_config(model, LoraConfig(r=4, alpha=3, dropout=dropout), "base")
    attach_adapter(model, config)
    module = model[0]
    assert isinstance(module, QuantizedLoraLinear)
    _, a, b = make_tensors()
    module.lora_A["default"].weight, module.lora_B["default"].weight = nn.Parameter(a), nn.Parameter(b)
    x = torch.randn(3, 32)
    module.eval()
    expected = autograd_output(make_layer(), x.double(), a.double(), b.double())
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    module.train()
    assert torch.equal(module(x), module(x)) == (dropout == 0)
    module.enable_adapters(False)
    torch.testing.assert_close(module(x), make_layer()(x))


def test_an_active_adapter_that_the_layer_lacks_is_ignored() -> None:
    model = nn.Sequential(make_layer())
    attach_adapter(model, make_peft_config(model, LoraConfig(r=4, dropout=0.0), "base"))
    assert isinstance(model[0], QuantizedLoraLinear) and isinstance(model[0], peft.tuners.lora.layer.LoraLayer)
    model[0]._active_adapter = "another"
    x = torch.randn(3, 32)
    torch.testing.assert_close(model[0](x), make_layer()(x))
