"""If this fails, the loss or its gradient differs from the model's."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

from qlora_dist.errors import UserError
from qlora_dist.model import loss as loss_module
from qlora_dist.model.logit_scale import LogitScale, measure_logit_scale
from qlora_dist.model.loss import IGNORE_INDEX, linear_cross_entropy_sum
from tests.helpers.architectures import ARCHITECTURES, SETTINGS_OF_ALL

SCALES = [LogitScale(), LogitScale(0.25), LogitScale(1.0, 3.0), LogitScale(2.0, 5.0)]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_loss_and_gradients_equal_autograds(
    *, scale: LogitScale, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "LOSS_CHUNK_LOGITS", 5 * 37)  # several chunks, of several blocks
    monkeypatch.setattr(loss_module, "_BLOCK_LOGITS", 2 * 37)
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 16), torch.randn(37, 16)
    bias = torch.randn(37) if with_bias else None
    labels = torch.randint(0, 37, (23,)).masked_fill_(torch.rand(23) < 0.3, IGNORE_INDEX)
    inputs = [t.requires_grad_(True) for t in (hidden, weight, bias) if t is not None]

    logits = scale.factor * nn.functional.linear(hidden, weight, bias)
    logits = logits if scale.cap is None else scale.cap * torch.tanh(logits / scale.cap)
    expected = cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    loss = linear_cross_entropy_sum(hidden, weight, bias, labels, scale)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for actual, reference in zip(
        torch.autograd.grad(loss * 0.7, inputs), torch.autograd.grad(expected * 0.7, inputs), strict=True
    ):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy_sum(hidden, weight, bias, labels, scale), expected, rtol=1e-6, atol=0
        )


def model_on_meta(name: str, **settings: object) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**(SETTINGS_OF_ALL | ARCHITECTURES[name] | settings))
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("name", "settings", "scale"),
    [
        ("Llama", {}, LogitScale()),
        ("Granite", {"logits_scaling": 8.0}, LogitScale(0.125)),
        ("Cohere", {"logit_scale": 0.0625}, LogitScale(0.0625)),
        ("Gemma2", {"final_logit_softcapping": 30.0}, LogitScale(1.0, 30.0)),
        ("GPTNeoX", {}, LogitScale()),
    ],
)
def test_the_scale_of_the_logits_is_measured(name: str, settings: dict[str, float], scale: LogitScale) -> None:
    model = model_on_meta(name, **settings)
    head_before, forward_before = model.get_output_embeddings(), type(model.base_model).forward
    measured = measure_logit_scale(model)
    assert measured.cap == scale.cap
    assert measured.factor == pytest.approx(scale.factor, rel=1e-6)
    assert model.get_output_embeddings() is head_before  # left unchanged
    assert model.base_model.forward.__func__ is forward_before


def test_an_unknown_logit_transform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_on_meta("Llama")
    forward = type(model).forward

    def squared(self: nn.Module, *args: object, **kwargs: object) -> object:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.square()
        return output

    monkeypatch.setattr(type(model), "forward", squared)
    with pytest.raises(UserError, match="the scale of its logits cannot be measured"):
        measure_logit_scale(model)
