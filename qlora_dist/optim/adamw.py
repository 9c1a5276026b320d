"""AdamW over a rank's shards, its moments in pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from qlora_dist.config import OptimConfig
from qlora_dist.optim.kernels import update_8bit, update_32bit, update_paged
from qlora_dist.optim.layout import Piece
from qlora_dist.optim.moments import MOMENTS, Moments


class PagedAdamW:
    """Loshchilov and Hutter's AdamW (2019, algorithm 2), page by page.

    The update is element-wise, so that a shard needs nothing of its parameter's rest, and its moments are as sharded as
    it is. Shards and gradients are used where they lie. Where the moments lie changes no number.

    Args:
        shards: fp32, contiguous, plain tensors.
        moments: of these shards.
        config: the section `optim`.
        lr_factors: of each shard's learning rate (LoRA+); none: 1.
        left_bytes: with `optim.resident_bytes: auto`, bytes that the device has for moments, if it holds so many now.
    """

    def __init__(
        self,
        shards: Sequence[nn.Parameter],
        moments: Moments,
        config: OptimConfig,
        lr_factors: Sequence[float] | None = None,
        left_bytes: Callable[[int], int] | None = None,
    ) -> None:
        self.shards, self.moments, self.config = list(shards), moments, config
        self.lr = config.lr
        self.steps = 0
        """Updates so far, which correct the moments' bias."""
        self._factors = list(lr_factors) if lr_factors is not None else [1.0] * len(self.shards)
        self._left_bytes = left_bytes

    @torch.no_grad()
    def step(self) -> None:
        """Update all shards by their gradients; the learning rate is `lr` times each one's factor."""
        if self.moments.is_automatic and self._left_bytes is not None:
            self.moments.fit(self._left_bytes(self.moments.resident_bytes))
        self.steps += 1
        for number, page in enumerate(self.moments.pages):
            memory = self.moments.use(number)
            for factor in sorted({self._factors[piece.shard] for piece in page.pieces}):
                pieces = [piece for piece in page.pieces if self._factors[piece.shard] == factor]
                self._update(memory, number, pieces, self.lr * factor)
            self.moments.done(number)

    def _update(self, memory: torch.Tensor, number: int, pieces: Sequence[Piece], lr: float) -> None:
        views = [self.moments.views(memory, number, piece) for piece in pieces]
        parameters = [_part(self.shards[piece.shard].detach(), piece) for piece in pieces]
        gradients = [_part(_gradient(self.shards[piece.shard]), piece) for piece in pieces]
        first, second = ([view[name] for view in views] for name in MOMENTS)
        if self.moments.bits == 32 and not self.moments.is_managed:
            update_32bit(parameters, gradients, first, second, self.config, lr, self.steps)
            return
        for parameter, gradient, view in zip(parameters, gradients, views, strict=True):
            if self.moments.bits == 32:
                update_paged(parameter, gradient, view["exp_avg"], view["exp_avg_sq"], self.config, lr, self.steps)
            else:
                codes = [(view[name], view[f"{name}.absmax"]) for name in MOMENTS]
                update_8bit(parameter, gradient, codes[0], codes[1], self.config, lr, self.steps)


def _part(flat: torch.Tensor, piece: Piece) -> torch.Tensor:
    return flat.view(-1)[piece.start : piece.start + piece.length]


def _gradient(shard: nn.Parameter) -> torch.Tensor:
    assert shard.grad is not None, "every shard that is not empty has a gradient"
    return shard.grad
