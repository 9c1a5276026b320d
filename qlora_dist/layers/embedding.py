"""Input embedding and output head whose weight is one vector of bytes."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.compat.transformers import mark_initialized
from qlora_dist.errors import UserError
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quantize import dequantize_rows, dequantize_weight


class QuantizedVocabMixin(nn.Module):
    """Mixin for an embedding's or a linear layer's class that replaces `weight` by a frozen `packed` parameter."""

    layout: NF4Layout
    """Layout of the weight, [vocabulary, h]."""
    dtype: torch.dtype
    """Type of the rows that are looked up."""
    packed: nn.Parameter
    """uint8[layout.total_bytes]."""

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight, dtype[vocabulary, h]. Under an engine, `packed` must be gathered."""
        return dequantize_weight(self.packed, self.layout, dtype)

    @property
    def weight(self) -> torch.Tensor:
        """Placeholder for code that reads the weight's type or device: dtype[vocabulary, h] in one element of memory.

        It is NaN, so that a computation with it does not go unnoticed.
        """
        nan = torch.full((), float("nan"), dtype=self.dtype, device=self.packed.device)
        placeholder = nan.expand(self.layout.shape)
        mark_initialized(placeholder)
        return placeholder


class QuantizedEmbedding(QuantizedVocabMixin, nn.Embedding):  # type: ignore[override]  # torch's `weight` can be assigned
    """Embedding that dequantizes only the rows that are looked up, if its rows are whole blocks."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids: int64[...] -> dtype[..., h], equal to the rows of `dequantize_weight`."""
        vocabulary, h = self.layout.shape
        if h % self.layout.block_size or not 0 < ids.numel() < vocabulary:
            return nn.functional.embedding(ids, self.dequantize(self.dtype))
        return dequantize_rows(self.packed, self.layout, ids.flatten(), self.dtype).view(*ids.shape, h)


class QuantizedHead(QuantizedVocabMixin, nn.Linear):  # type: ignore[override]  # torch's `weight` can be assigned
    """Output head. It is no QuantizedLinear, because it takes no adapter and is gathered in forward only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x: [..., h] to logits: [..., vocabulary], in x's type."""
        return nn.functional.linear(x, self.dequantize(x.dtype), self.bias)


def use_quantized_vocab(module: nn.Embedding | nn.Linear, layout: NF4Layout, dtype: torch.dtype) -> None:
    """Replace the weight of an embedding or an output head by a `packed` parameter without values.

    The module's class is changed in place, so references to it stay valid. Its bias and its other behaviour, such as
    the scaling of Gemma's embedding, stay. `dtype` is the type of the rows that are looked up.

    Raises:
        UserError: the module's class computes with the weight itself.
    """
    check_vocab_class(module)
    base, quantized_class = (
        (nn.Embedding, QuantizedEmbedding) if isinstance(module, nn.Embedding) else (nn.Linear, QuantizedHead)
    )
    packed = torch.empty(layout.total_bytes, dtype=torch.uint8, device=module.weight.device)
    del module.weight
    # the 4-bit class follows the module's own class, whose `super().forward` then calls it
    module_class = type(module)
    module.__class__ = (
        quantized_class
        if module_class is base
        else type(f"Quantized{module_class.__name__}", (module_class, quantized_class), {})
    )
    assert isinstance(module, QuantizedVocabMixin)
    module.layout, module.dtype = layout, dtype
    module.packed = nn.Parameter(packed, requires_grad=False)


def vocab_weight_names(model: PreTrainedModel) -> tuple[str, str]:
    """Return the names of the weights of the input embedding and of the output head."""
    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return f"{paths[id(embedding)]}.weight", f"{paths[id(head)]}.weight"


def check_vocab_class(module: nn.Module) -> None:
    """Raise a UserError if the class of an embedding or output head computes with the weight itself."""
    forward = type(module).forward
    if forward in (nn.Embedding.forward, nn.Linear.forward):
        return
    code = getattr(forward, "__code__", None)
    if code is None or "__class__" not in code.co_freevars:  # a function that calls `super()` has it
        raise UserError(
            f"{type(module).__name__}: this class computes with its weight itself, so it cannot be in 4 bit; leave out "
            "model.embeddings, or --embeddings"
        )
