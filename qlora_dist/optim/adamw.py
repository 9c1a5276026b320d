"""AdamW over a rank's shards, with its states in pages."""

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

    The update is element-wise, so a shard and its state need nothing of the parameter's other shards. Shards and
    gradients are updated in place. The place of the states changes no number.

    Args:
        shards: plain tensors, fp32 and contiguous.
        optimizer_state: states of these shards.
        config: the section `optim`.
        lr_factors: factor of each shard's learning rate (LoRA+); None: 1.
        available_bytes: returns the bytes that the device has for states, given the bytes that they take now; called if
            `optim.resident_bytes` is `auto`.
    """

    def __init__(
        self,
        shards: Sequence[nn.Parameter],
        optimizer_state: PagedOptimizerState,
        config: OptimConfig,
        lr_factors: Sequence[float] | None = None,
        available_bytes: Callable[[int], int] | None = None,
    ) -> None:
        self.shards, self.optimizer_state, self.config = list(shards), optimizer_state, config
        self.lr = config.lr
        self.steps = 0
        """Updates so far; AdamW's bias correction needs them."""
        self._factors = list(lr_factors) if lr_factors is not None else [1.0] * len(self.shards)
        self._available_bytes = available_bytes
        self._groups_by_page: dict[tuple[int, int], list[_UpdateGroup]] = {}  # by page and its memory

    @torch.no_grad()
    def step(self) -> None:
        """Update all shards by their gradients. The learning rate of each is `lr` times its factor."""
        if self.optimizer_state.is_automatic and self._available_bytes is not None:
            available_bytes = self._available_bytes(self.optimizer_state.resident_bytes)
            if self.optimizer_state.needs_resize(available_bytes):
                self._groups_by_page.clear()  # the views would keep the pages' present memory alive
                self.optimizer_state.resize(available_bytes)
        self.steps += 1
        for number in range(len(self.optimizer_state.pages)):
            memory = self.optimizer_state.acquire(number)
            for group in self._groups(number, memory):
                self._update(group)
            self.optimizer_state.release(number)

    def _groups(self, number: int, memory: torch.Tensor) -> list[_UpdateGroup]:
        """Return a page's slices by learning rate. They are cached: slicing takes as long as a small update."""
        key = number, storage_key(memory.untyped_storage())
        if key not in self._groups_by_page:
            slices = self.optimizer_state.pages[number].slices
            factors = sorted({self._factors[piece.shard] for piece in slices})
            self._groups_by_page[key] = [
                self._group(number, memory, [piece for piece in slices if self._factors[piece.shard] == factor], factor)
                for factor in factors
            ]
        return self._groups_by_page[key]

    def _group(self, number: int, memory: torch.Tensor, slices: Sequence[PageSlice], factor: float) -> _UpdateGroup:
        shards = [self.shards[piece.shard] for piece in slices]
        whole = [piece.length == shard.numel() for piece, shard in zip(slices, shards, strict=True)]
        parameters = [
            shard.detach() if is_whole else _slice(shard.detach(), piece)
            for shard, piece, is_whole in zip(shards, slices, whole, strict=True)
        ]
        views = [
            self.optimizer_state.views(memory, number, piece, parameter.shape)
            for piece, parameter in zip(slices, parameters, strict=True)
        ]
        return _UpdateGroup(lr_factor=factor, slices=slices, is_whole=whole, parameters=parameters, views=views)

    def _update(self, group: _UpdateGroup) -> None:
        lr = self.lr * group.lr_factor
        gradients = []
        for piece, is_whole in zip(group.slices, group.is_whole, strict=True):
            gradient = self.shards[piece.shard].grad
            assert gradient is not None, "every shard that is not empty has a gradient"
            gradients.append(gradient if is_whole else _slice(gradient, piece))
        if self.optimizer_state.bits == 32 and not self.optimizer_state.is_unified:
            exp_avgs, exp_avg_sqs = ([view[name] for view in group.views] for name in STATE_NAMES)
            fused_adamw(group.parameters, gradients, exp_avgs, exp_avg_sqs, self.config, lr, self.steps)
            return
        for parameter, gradient, view in zip(group.parameters, gradients, group.views, strict=True):
            if self.optimizer_state.bits == 32:
                bnb_adamw_32bit(parameter, gradient, view["exp_avg"], view["exp_avg_sq"], self.config, lr, self.steps)
            else:
                codes = [(view[name], view[f"{name}.absmax"]) for name in STATE_NAMES]
                bnb_adamw_8bit(parameter, gradient, codes[0], codes[1], self.config, lr, self.steps)


@dataclass(frozen=True, kw_only=True)
class _UpdateGroup:
    """The slices of a page that have one learning rate."""

    lr_factor: float
    slices: Sequence[PageSlice]
    is_whole: Sequence[bool]
    """Whether each slice is a whole shard, with the shard's shape; else it is flat."""
    parameters: list[torch.Tensor]
    views: list[dict[str, torch.Tensor]]
    """States of each slice, by name."""


def _slice(tensor: torch.Tensor, piece: PageSlice) -> torch.Tensor:
    return tensor.view(-1)[piece.start : piece.start + piece.length]
