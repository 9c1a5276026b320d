"""If this fails, the adapter learns from something else than the gradient of what the layer computes."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_dist.adapters import lora_matmul as fused
from qlora_dist.adapters.attach import attach_adapter, make_peft_config
from qlora_dist.adapters.lora import NF4LoraLinear
from qlora_dist.adapters.lora_matmul import lora_matmul
from qlora_dist.config.sections import LoraConfig
from qlora_dist.nf4.linear import NF4Linear
from qlora_dist.nf4.quantize import quantize_weight

SCALING = 0.75


def layer(bias: bool = True) -> NF4Linear:
    torch.manual_seed(0)
    packed, layout = quantize_weight(torch.randn(48, 32))
    module = NF4Linear(layout, bias, torch.float32)
    module.packed.data = packed
    if module.bias is not None:
        module.bias.data.normal_()
    return module


def tensors(dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> list[torch.Tensor]:
    """x, A, B."""
    torch.manual_seed(1)
    shapes = ((2, 5, 32), (4, 32), (48, 4))
    return [torch.randn(shape, dtype=dtype).requires_grad_(requires_grad or i > 0) for i, shape in enumerate(shapes)]


def plain(
    base: NF4Linear, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dropped: torch.Tensor | None = None
) -> torch.Tensor:
    """By autograd, in fp64."""
    weight, bias = base.dequantize(torch.float32).double(), base.bias
    y = nn.functional.linear(x, weight, bias.double() if bias is not None else None)
    return y + SCALING * ((x if dropped is None else dropped) @ a.T @ b.T)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_values_and_gradients(bias: bool, dropout: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)  # the operator, without the compiler
    base, ours = layer(bias), tensors()
    theirs = [t.detach().double().requires_grad_() for t in ours]
    keep = (torch.rand(2, 5, 32) < 0.7) / 0.7
    y = lora_matmul(ours[0], base, *ours[1:], SCALING, ours[0] * keep if dropout else None)
    expected = plain(base, *theirs, theirs[0] * keep.double() if dropout else None)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    wanted = torch.autograd.grad(expected, theirs, grad.double())
    for a, b in zip(torch.autograd.grad(y, ours, grad), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_an_input_that_is_not_trained_gets_no_gradient(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    base, (x, a, b) = layer(), tensors(requires_grad=False)
    y = lora_matmul(x, base, a, b, SCALING)
    expected = torch.autograd.grad(plain(base, x.double(), a.double(), b.double()).sum(), [a, b])
    monkeypatch.setattr(NF4Linear, "dequantize", None)  # nor is the weight dequantized for it
    monkeypatch.setattr(fused, "dequantize_weight", None)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), [a, b]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_operator_keeps_the_contract_of_torch() -> None:
    base, (x, a, b) = layer(), tensors()
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


def test_a_checkpointed_layer_dequantizes_its_last_weight_twice_not_three_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, (x, a, b) = layer(), tensors()
    reference = torch.autograd.grad(lora_matmul(x, base, a, b, SCALING).square().sum(), [x, a, b])
    calls, dequantize = [], NF4Linear.dequantize

    def counted(self: NF4Linear, dtype: torch.dtype) -> torch.Tensor:
        calls.append(dtype)
        return dequantize(self, dtype)

    monkeypatch.setattr(NF4Linear, "dequantize", counted)
    y = checkpoint(lambda x: lora_matmul(x, base, a, b, SCALING), x, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(y.square().sum(), [x, a, b]), reference, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(calls) == 2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_layer_is_pefts(dropout: float) -> None:
    """With two adapters active, the plain path, and with one, the fused one: the same function."""
    model = nn.Sequential(layer())
    config = make_peft_config(model, LoraConfig(r=4, alpha=3, dropout=dropout), "base")
    attach_adapter(model, config)
    module = model[0]
    assert isinstance(module, NF4LoraLinear)
    _, a, b = tensors()
    module.lora_A["default"].weight, module.lora_B["default"].weight = nn.Parameter(a), nn.Parameter(b)
    x = torch.randn(3, 32)
    module.eval()
    expected = plain(layer(), x.double(), a.double(), b.double())
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    module.train()
    assert torch.equal(module(x), module(x)) == (dropout == 0)
    module.enable_adapters(False)
    torch.testing.assert_close(module(x), layer()(x))


def test_peft_is_not_asked_for_adapters_that_are_not_there() -> None:
    model = nn.Sequential(layer())
    attach_adapter(model, make_peft_config(model, LoraConfig(r=4, dropout=0.0), "base"))
    assert isinstance(model[0], NF4LoraLinear) and isinstance(model[0], peft.tuners.lora.layer.LoraLayer)
    model[0]._active_adapter = "another"
    x = torch.randn(3, 32)
    torch.testing.assert_close(model[0](x), layer()(x))
