"""Scale of a model's logits after the output head: a factor (Granite, Cohere), a soft cap (Gemma-2), or neither.

The loss is computed in chunks of logits, so transformers' own forward pass, which scales and caps them, does not run to
its end. Its scale is therefore measured beforehand. A model whose scale cannot be measured is refused, because a wrong
loss would train silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.errors import UserError
from qlora_dist.model.language_model import find_decoder
from qlora_dist.model.stand_ins import DecoderOutput, replaced_forward

_TOLERANCE = 1e-5  # relative and absolute; the measurement is in fp64 unless the model casts to fp32


@dataclass(frozen=True)
class LogitScale:
    """Map from the head's product z to logits: cap * tanh(factor * z / cap), or factor * z without a cap."""

    factor: float = 1.0
    cap: float | None = None

    def apply_(self, z: torch.Tensor, *, with_grad: bool = True) -> torch.Tensor | float | None:
        """Turn z: fp32[...] into logits in place, and return d logits / d z, of z's shape or a number.

        The slope is None if it is 1 or not requested.
        """
        if self.factor != 1.0:
            z.mul_(self.factor)
        if self.cap is None:
            return self.factor if self.factor != 1.0 and with_grad else None
        z.div_(self.cap).tanh_()
        slope = z.square().neg_().add_(1).mul_(self.factor) if with_grad else None
        z.mul_(self.cap)
        return slope


NO_LOGIT_SCALE = LogitScale()


def measure_logit_scale(model: PreTrainedModel) -> LogitScale:
    """Measure the scale by running the model's own forward pass with a stand-in for its decoder and its head.

    The model, transformers' own class on meta, is left unchanged.

    Raises:
        UserError: no factor and cap explain the logits.
    """
    generator = torch.Generator().manual_seed(0)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise _unknown_logit_scale_error(model, "its output head is no linear layer")
    probe = nn.Linear(head.in_features, 64, bias=head.bias is not None, dtype=torch.float64)
    for parameter in probe.parameters():
        parameter.data.normal_(generator=generator)
    hidden = torch.randn(1, 2, head.in_features, generator=generator, dtype=torch.float64)
    with torch.no_grad(), _probe_decoder_and_head(model, hidden, probe):
        try:
            ids = torch.zeros(1, 2, dtype=torch.int64)
            logits = model(input_ids=ids, use_cache=False, return_dict=True).logits.double().flatten()
        except Exception as error:  # the model's code may raise any kind
            reason = "its output head is not a single matrix after the decoder"
            raise _unknown_logit_scale_error(model, reason) from error
        z = probe(hidden).flatten()
    smallest = int(z.abs().argmin())  # a cap changes the smallest value least
    for cap in (None, *_caps(model)):
        value = logits[smallest] if cap is None else cap * torch.atanh(logits[smallest] / cap)
        factor = float(value / z[smallest])
        scale = LogitScale(1.0 if abs(factor - 1) < _TOLERANCE else factor, cap)
        scaled = z.clone()
        scale.apply_(scaled)
        if torch.allclose(scaled, logits, rtol=_TOLERANCE, atol=_TOLERANCE):
            return scale
    raise _unknown_logit_scale_error(model, "neither a factor nor a soft cap explains its logits")


def _caps(model: PreTrainedModel) -> list[float]:
    config = model.config.get_text_config().to_dict()
    names = [name for name in config if "logit" in name and "cap" in name and "attn" not in name]
    return [float(config[name]) for name in names if isinstance(config[name], int | float)]


@contextmanager
def _probe_decoder_and_head(model: PreTrainedModel, hidden: torch.Tensor, probe: nn.Linear) -> Iterator[None]:
    body, embedding, head = _module_before_head(model), model.get_input_embeddings(), model.get_output_embeddings()
    output = DecoderOutput((hidden,))
    model.set_output_embeddings(probe)
    try:
        # Llama 4 looks tokens up outside of the module before its head
        with replaced_forward(body, lambda *_, **__: output), replaced_forward(embedding, lambda *_, **__: hidden):
            yield
    finally:
        model.set_output_embeddings(head)


def _module_before_head(model: PreTrainedModel) -> nn.Module:
    """Return the decoder, or the outermost module around it that has no head, which a multimodal class calls."""
    decoder, head = find_decoder(model), model.get_output_embeddings()
    if model.config.get_text_config() is model.config:
        return decoder
    modules: Iterator[nn.Module] = model.modules()
    return next(module for module in modules if _contains(module, decoder) and not _contains(module, head))


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(child is part for child in module.modules())


def _unknown_logit_scale_error(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"model_type {model.config.model_type}: the scale of its logits cannot be measured ({reason}); give "
        "another model"
    )
