"""Output head that gives the logits, or the loss without all logits in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_dist.layers.embedding import QuantizedVocabMixin
from qlora_dist.layers.token_rows import TokenRows, add_token_rows_to_logits, token_rows
from qlora_dist.model.logit_scale import NO_LOGIT_SCALE, LogitScale
from qlora_dist.model.row_chunks import rows_per_chunk
from qlora_dist.runtime.byte_sizes import LOSS_CHUNK_LOGITS

IGNORE_INDEX = -100
"""Label of a position that is not trained."""

if TYPE_CHECKING:
    _Embedding = nn.Embedding
    _Linear = nn.Linear
else:  # a mixin without a base class calls the forward of the class that it is mixed into
    _Embedding = _Linear = object

_BLOCK_LOGITS = 2**21  # elements at a time in fp32, on a CPU


def use_loss_head(head: nn.Linear, scale: LogitScale) -> None:
    """Make an output head of any class return the loss if it receives labels."""
    head.__class__ = type("LossHead", (_LossHead, type(head)), {"scale": scale})


def tie_head_to_embedding(embedding: nn.Embedding, scale: LogitScale) -> None:
    """Make a frozen embedding serve as the output head too (tied weights).

    It is one parameter in one unit of sharding, because modules in two units cannot share a parameter. One unit of
    both modules would stay gathered from the first layer to the last.
    """
    embedding.__class__ = type("SharedEmbedding", (_TiedEmbedding, type(embedding)), {"scale": scale})


class _LossHead(_Linear):
    scale: LogitScale

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Map hidden [..., h] to logits [..., vocabulary], or with labels int64[...] to the summed loss, fp32[]."""
        rows = token_rows(self)
        if labels is None:
            logits = super().forward(hidden)
            return logits if rows is None else add_token_rows_to_logits(logits, hidden, rows)
        return linear_cross_entropy_sum(
            hidden.flatten(0, -2), _weight(self, hidden), self.bias, labels.flatten(), self.scale, rows
        )


class _TiedEmbedding(_Embedding):
    scale: LogitScale

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Map ids int64[...] to [..., h], or hidden [..., h] to the output of a loss head."""
        if not x.is_floating_point():
            return super().forward(x)
        rows = token_rows(self)
        if labels is None:
            logits = nn.functional.linear(x, _weight(self, x))
            return logits if rows is None else add_token_rows_to_logits(logits, x, rows)
        return linear_cross_entropy_sum(x.flatten(0, -2), _weight(self, x), None, labels.flatten(), self.scale, rows)


class TiedHead(nn.Module):
    """Replacement of a tied `lm_head`. It calls the embedding as a module, so that the engine gathers its unit."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list: not a submodule, or its parameter would be listed twice

    @property
    def weight(self) -> torch.Tensor:
        """Weight of the embedding, whose type Mamba's class reads."""
        return self._embedding[0].weight

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        output: torch.Tensor = self._embedding[0](hidden, labels)
        return output


def _weight(module: nn.Embedding | nn.Linear, like: torch.Tensor) -> torch.Tensor:
    """Return the weight, [vocabulary, h], dequantized for this call if it is in 4 bit."""
    return module.dequantize(like.dtype) if isinstance(module, QuantizedVocabMixin) else module.weight


def linear_cross_entropy_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scale: LogitScale = NO_LOGIT_SCALE,
    rows: TokenRows | None = None,
) -> torch.Tensor:
    """Return fp32[], the sum of the cross entropies over the positions whose label is not IGNORE_INDEX.

    The shapes are hidden [n, h] in bf16, fp16 or fp32, weight [vocabulary, h], bias [vocabulary] and labels int64[n].
    `rows` replace rows of the weight or follow it, and then there is no bias.

    The logits exist in chunks of 16 million, of trained positions only, and on a CPU in fp32 two million at a time. The
    gradients are computed along with the loss, so backward needs neither the logits nor the weight. A sharded head is
    therefore gathered once per step. The gradient of a trained weight is summed in fp32.

    `torch.nn.functional.linear_cross_entropy` (2.13) does the same in principle, but returns the sum in hidden's type.
    That is off by 0.8 % for 341 tokens in bf16. On a CPU it takes at least twice the time (docs/log.md).
    """
    assert rows is None or bias is None
    values = None if rows is None else rows.values.to(hidden.dtype)
    loss: torch.Tensor = _LinearCrossEntropySum.apply(hidden, weight, bias, labels, scale, rows, values)
    return loss


def _softmax_grad_(
    logits: torch.Tensor, targets: torch.Tensor, scale: LogitScale, grad_bias: torch.Tensor | None, *, wants_grad: bool
) -> torch.Tensor:
    """Return the summed loss of logits[n, vocabulary] and targets[n, 1].

    With `wants_grad`, d loss / d logits overwrites the logits: softmax - one-hot, times the gradient of the scale.
    """
    values = logits.float()  # fp32 logits are not copied
    scale_grad = scale.apply_(values, with_grad=wants_grad)
    peak, target_logits = values.amax(dim=1, keepdim=True), values.gather(1, targets)
    exponentials = values.sub_(peak).exp_()
    total = exponentials.sum(dim=1, keepdim=True)
    loss = (total.log() + peak - target_logits).sum()
    if wants_grad:
        probabilities = exponentials.div_(total)
        probabilities.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=values.dtype))
        if scale_grad is not None:
            probabilities.mul_(scale_grad)
        if grad_bias is not None:
            grad_bias += probabilities.sum(dim=0)
        logits.copy_(probabilities)
    return loss


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        scale: LogitScale,
        rows: TokenRows | None,
        values: torch.Tensor | None,
    ) -> torch.Tensor:
        wants_weight = any(ctx.needs_input_grad[1:3])
        wants_grad = ctx.needs_input_grad[0] or wants_weight or ctx.needs_input_grad[6]
        grad = torch.zeros_like(hidden) if wants_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_weight and bias is not None else None
        own = None if rows is None or values is None else _OwnLogits(rows, values, weight.shape[0])
        vocabulary = weight.shape[0] if rows is None else rows.vocabulary
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        loss_rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        size = max(1, LOSS_CHUNK_LOGITS // vocabulary)
        buffer = hidden.new_empty(min(size, len(loss_rows)), vocabulary)
        block = rows_per_chunk(buffer, _BLOCK_LOGITS)
        for positions in loss_rows.split(size):
            inputs, logits = hidden[positions], buffer[: len(positions)]
            weight_logits = logits[:, : weight.shape[0]]
            if bias is None:
                torch.mm(inputs, weight.t(), out=weight_logits)
            else:
                torch.addmm(bias, inputs, weight.t(), out=weight_logits)
            if own is not None:
                own.write(inputs, logits)
            for part, targets in zip(logits.split(block), labels[positions].split(block), strict=True):
                loss += _softmax_grad_(part, targets.unsqueeze(1), scale, grad_bias, wants_grad=wants_grad)
            if grad is None:
                continue
            if own is None:
                grad[positions] = logits @ weight
            else:
                grad[positions] = torch.addmm(own.backward_(inputs, logits), weight_logits, weight)
            if grad_weight is not None:
                grad_weight += weight_logits.t() @ inputs
        ctx.gradients = grad, grad_weight, grad_bias, None if own is None else own.grad
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype, hidden.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_loss,) = grads
        (grad, grad_weight, grad_bias, grad_values), ctx.gradients = ctx.gradients, None
        weight_dtype, bias_dtype, values_dtype = ctx.dtypes
        # in fp32, because a loss scale divided by few tokens is infinite in fp16
        return (
            (grad.float() * grad_loss).to(grad.dtype),
            None if grad_weight is None else grad_weight.mul_(grad_loss).to(weight_dtype),
            None if grad_bias is None else grad_bias.mul_(grad_loss).to(bias_dtype),
            None,
            None,
            None,
            None if grad_values is None else grad_values.mul_(grad_loss).to(values_dtype),
        )


class _OwnLogits:
    """Logits of rows that have values of their own, and the gradient of the values."""

    def __init__(self, rows: TokenRows, values: torch.Tensor, weight_rows: int) -> None:
        self._values, self._index = values, rows.index(values.device)
        replaced = [token for token in rows.ids if token < weight_rows]
        self._replaced = torch.tensor(replaced, dtype=torch.int64, device=values.device)
        self.grad = torch.zeros_like(values, dtype=torch.float32)
        """fp32[n, h], summed over the calls of `backward_`."""

    def write(self, inputs: torch.Tensor, logits: torch.Tensor) -> None:
        """Write the rows' columns of logits [n, vocabulary], given inputs [n, h]."""
        logits[:, self._index] = inputs @ self._values.t()

    def backward_(self, inputs: torch.Tensor, logits_grad: torch.Tensor) -> torch.Tensor:
        """Return the rows' part of the inputs' gradient, [n, h], and set replaced columns of `logits_grad` to zero."""
        own_grad = logits_grad[:, self._index]
        logits_grad[:, self._replaced] = 0
        self.grad += own_grad.t() @ inputs
        return own_grad @ self._values
