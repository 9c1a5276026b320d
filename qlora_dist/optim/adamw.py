"""AdamW over a rank's shards, its moments in pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora_dist.compat.torch import storage_key
from qlora_dist.config.sections import OptimConfig
from qlora_dist.optim.adamw_kernels import bnb_adamw_8bit, bnb_adamw_32bit, fused_adamw
from qlora_dist.optim.optimizer_state import STATE_NAMES, PagedOptimizerState
from qlora_dist.optim.state_pages import PageSlice


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
        optimizer_state: PagedOptimizerState,
        config: OptimConfig,
        lr_factors: Sequence[float] | None = None,
        available_bytes: Callable[[int], int] | None = None,
    ) -> None:
        self.shards, self.moments, self.config = list(shards), optimizer_state, config
        self.lr = config.lr
        self.steps = 0
        """Updates so far, which correct the moments' bias."""
        self._factors = list(lr_factors) if lr_factors is not None else [1.0] * len(self.shards)
        self._left_bytes = available_bytes
        self._kept: dict[tuple[int, int], list[_UpdateGroup]] = {}  # by page, and where it lies

    @torch.no_grad()
    def step(self) -> None:
        """Update all shards by their gradients; the learning rate is `lr` times each one's factor."""
        if self.moments.is_automatic and self._left_bytes is not None:
            left_bytes = self._left_bytes(self.moments.resident_bytes)
            if self.moments.needs_resize(left_bytes):
                self._kept.clear()  # before: they hold the memory that the pages are to leave
                self.moments.fit(left_bytes)
        self.steps += 1
        for number in range(len(self.moments.pages)):
            memory = self.moments.use(number)
            for part in self._parts(number, memory):
                self._update(part)
            self.moments.done(number)

    def _parts(self, number: int, memory: torch.Tensor) -> list[_UpdateGroup]:
        """What is updated with a page, by learning rate. Kept: making slices takes as long as small updates."""
        key = number, storage_key(memory.untyped_storage())
        if key not in self._kept:
            pieces = self.moments.pages[number].pieces
            factors = sorted({self._factors[piece.shard] for piece in pieces})
            self._kept[key] = [
                self._part(number, memory, [piece for piece in pieces if self._factors[piece.shard] == factor], factor)
                for factor in factors
            ]
        return self._kept[key]

    def _part(self, number: int, memory: torch.Tensor, pieces: Sequence[PageSlice], factor: float) -> _UpdateGroup:
        shards = [self.shards[piece.shard] for piece in pieces]
        whole = [piece.length == shard.numel() for piece, shard in zip(pieces, shards, strict=True)]
        parameters = [
            shard.detach() if is_whole else _slice(shard.detach(), piece)
            for shard, piece, is_whole in zip(shards, pieces, whole, strict=True)
        ]
        views = [
            self.moments.views(memory, number, piece, parameter.shape)
            for piece, parameter in zip(pieces, parameters, strict=True)
        ]
        codes = [view[name] for name in STATE_NAMES for view in views]
        return _UpdateGroup(factor, pieces, whole, parameters, views, codes[: len(views)], codes[len(views) :])

    def _update(self, part: _UpdateGroup) -> None:
        lr = self.lr * part.lr_factor
        gradients = []
        for piece, is_whole in zip(part.pieces, part.is_whole, strict=True):
            gradient = self.shards[piece.shard].grad
            assert gradient is not None, "every shard that is not empty has a gradient"
            gradients.append(gradient if is_whole else _slice(gradient, piece))
        if self.moments.bits == 32 and not self.moments.is_unified:
            fused_adamw(part.parameters, gradients, part.first, part.second, self.config, lr, self.steps)
            return
        for parameter, gradient, view in zip(part.parameters, gradients, part.views, strict=True):
            if self.moments.bits == 32:
                bnb_adamw_32bit(parameter, gradient, view["exp_avg"], view["exp_avg_sq"], self.config, lr, self.steps)
            else:
                codes = [(view[name], view[f"{name}.absmax"]) for name in STATE_NAMES]
                bnb_adamw_8bit(parameter, gradient, codes[0], codes[1], self.config, lr, self.steps)


@dataclass(frozen=True)
class _UpdateGroup:
    """The pieces of a page that have one learning rate, and what lies where."""

    lr_factor: float
    pieces: Sequence[PageSlice]
    is_whole: Sequence[bool]
    """Of each piece: whether it is a shard, in its shape, or a flat part of one."""
    parameters: list[torch.Tensor]
    views: list[dict[str, torch.Tensor]]
    """Moments."""
    first: list[torch.Tensor]
    second: list[torch.Tensor]


def _slice(tensor: torch.Tensor, piece: PageSlice) -> torch.Tensor:
    return tensor.view(-1)[piece.start : piece.start + piece.length]
