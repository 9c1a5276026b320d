"""The matrices with a row for each token of the vocabulary, input embedding and output head, as vectors of bytes."""

from __future__ import annotations

import torch
from torch import nn

from qlora_dist.compat.transformers import mark_initialized
from qlora_dist.errors import UserError
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quantize import dequantize_rows, dequantize_weight


class NF4VocabMixin(nn.Module):
    """Mixed into an embedding's or a linear layer's class: `packed` stands where `weight` stood, frozen."""

    layout: NF4Layout
    """Shape [vocabulary, h]."""
    dtype: torch.dtype
    """What is looked up has this type."""
    packed: nn.Parameter

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """weight: dtype[vocabulary, h]. Under an engine, only where `packed` is gathered."""
        return dequantize_weight(self.packed, self.layout, dtype)

    @property
    def weight(self) -> torch.Tensor:
        """dtype[vocabulary, h] of NaN, one element of memory: for code that asks for the weight's type or device.

        Code that computes with it would otherwise do so with something that is not the weight, and nobody would know.
        """
        placeholder = torch.full((), float("nan"), dtype=self.dtype, device=self.packed.device).expand(
            self.layout.shape
        )
        mark_initialized(placeholder)
        return placeholder


class NF4Embedding(NF4VocabMixin, nn.Embedding):  # type: ignore[override]  # torch's `weight` can be assigned
    """An embedding of which only the rows that are looked up are dequantized, where blocks end with the rows."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64[...] -> dtype[..., h], equal to the rows of `dequantize_weight`."""
        vocabulary, h = self.layout.shape
        if h % self.layout.block_size or not 0 < ids.numel() < vocabulary:
            return nn.functional.embedding(ids, self.dequantize(self.dtype))
        return dequantize_rows(self.packed, self.layout, ids.flatten(), self.dtype).view(*ids.shape, h)


class NF4Head(NF4VocabMixin, nn.Linear):  # type: ignore[override]  # torch's `weight` can be assigned
    """An output head. It is no NF4Linear: adapters are for the layers, and a head is gathered in forward alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., h] -> [..., vocabulary], in x's type."""
        return nn.functional.linear(x, self.dequantize(x.dtype), self.bias)


def use_nf4_vocab(module: nn.Embedding | nn.Linear, layout: NF4Layout, dtype: torch.dtype) -> None:
    """Have an embedding or an output head keep its weight in 4 bit, whatever else its class does (Gemma's scales).

    It stays the module it is, so whatever refers to it still does. `packed` has no values yet.

    Args:
        module: in 16 or 32 bit; its bias stays.
        layout: of the weight.
        dtype: of what is looked up.

    Raises:
        UserError: its class computes with the weight itself.
    """
    check_vocab_class(module)
    base, nf4_class = (nn.Embedding, NF4Embedding) if isinstance(module, nn.Embedding) else (nn.Linear, NF4Head)
    packed = torch.empty(layout.total_bytes, dtype=torch.uint8, device=module.weight.device)
    del module.weight
    # behind the module's own class: what that calls `super().forward` is ours
    module_class = type(module)
    module.__class__ = (
        nf4_class if module_class is base else type(f"NF4{module_class.__name__}", (module_class, nf4_class), {})
    )
    assert isinstance(module, NF4VocabMixin)
    module.layout, module.dtype = layout, dtype
    module.packed = nn.Parameter(packed, requires_grad=False)


def check_vocab_class(module: nn.Module) -> None:
    """See whether an embedding or output head can be in 4 bit.

    Raises:
        UserError: it looks up or multiplies in a way of its own.
    """
    forward = type(module).forward
    if forward in (nn.Embedding.forward, nn.Linear.forward):
        return
    code = getattr(forward, "__code__", None)
    if code is None or "__class__" not in code.co_freevars:  # which is there where `super()` is called
        raise UserError(
            f"{type(module).__name__}: what this class does with its weight is not known here, and it cannot be in "
            "4 bit; leave out model.embeddings, or --embeddings"
        )
