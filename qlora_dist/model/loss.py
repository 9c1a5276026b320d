"""Output head that gives the logits, or the loss without all logits in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_dist.layers.embedding import QuantizedVocabMixin
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
        if labels is None:
            return super().forward(hidden)
        return linear_cross_entropy_sum(
            hidden.flatten(0, -2), _weight(self, hidden), self.bias, labels.flatten(), self.scale
        )


class _TiedEmbedding(_Embedding):
    scale: LogitScale

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Map ids int64[...] to [..., h], or hidden [..., h] to the output of a loss head."""
        if not x.is_floating_point():
            return super().forward(x)
        if labels is None:
            return nn.functional.linear(x, _weight(self, x))
        return linear_cross_entropy_sum(x.flatten(0, -2), _weight(self, x), None, labels.flatten(), self.scale)


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
) -> torch.Tensor:
    """Return fp32[], the sum of the cross entropies over the positions whose label is not IGNORE_INDEX.

    The shapes are hidden [n, h] in bf16, fp16 or fp32, weight [vocabulary, h], bias [vocabulary] and labels int64[n].

    The logits exist in chunks of 16 million, of trained positions only, and on a CPU in fp32 two million at a time. The
    gradients are computed along with the loss, so backward needs neither the logits nor the weight. A sharded head is
    therefore gathered once per step. The gradient of a trained weight is summed in fp32.

    `torch.nn.functional.linear_cross_entropy` (2.13) does the same in principle, but returns the sum in hidden's type.
    That is off by 0.8 % for 341 tokens in bf16. On a CPU it takes at least twice the time (docs/log.md).
    """
    loss: torch.Tensor = _LinearCrossEntropySum.apply(hidden, weight, bias, labels, scale)
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
    ) -> torch.Tensor:
        wants_weight = any(ctx.needs_input_grad[1:3])
        wants_grad = ctx.needs_input_grad[0] or wants_weight
        grad = torch.zeros_like(hidden) if wants_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_weight and bias is not None else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        loss_rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        size = max(1, LOSS_CHUNK_LOGITS // weight.shape[0])
        buffer = hidden.new_empty(min(size, len(loss_rows)), weight.shape[0])
        block = rows_per_chunk(buffer, _BLOCK_LOGITS)
        for rows in loss_rows.split(size):
            inputs, logits = hidden[rows], buffer[: len(rows)]
            if bias is None:
                torch.mm(inputs, weight.t(), out=logits)
            else:
                torch.addmm(bias, inputs, weight.t(), out=logits)
            for part, targets in zip(logits.split(block), labels[rows].split(block), strict=True):
                loss += _softmax_grad_(part, targets.unsqueeze(1), scale, grad_bias, wants_grad=wants_grad)
            if grad is None:
                continue
            grad[rows] = logits @ weight
            if grad_weight is not None:
                grad_weight += logits.t() @ inputs
        ctx.gradients = grad, grad_weight, grad_bias
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_loss,) = grads
        (grad, grad_weight, grad_bias), ctx.gradients = ctx.gradients, None
        weight_dtype, bias_dtype = ctx.dtypes
        # in fp32, because a loss scale divided by few tokens is infinite in fp16
        return (
            (grad.float() * grad_loss).to(grad.dtype),
            None if grad_weight is None else grad_weight.mul_(grad_loss).to(weight_dtype),
            None if grad_bias is None else grad_bias.mul_(grad_loss).to(bias_dtype),
            None,
            None,
        )
