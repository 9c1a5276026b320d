"""The frozen decoder layers as pages: some stay on the device, the others come ahead of their use, there and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from qlora_dist.compat.fsdp import PassDirection, frozen_shards, page_frozen_parameters
from qlora_dist.config.sections import PagingConfig
from qlora_dist.errors import UserError
from qlora_dist.paging.page_store import page_store_factory
from qlora_dist.paging.pager import Pager
from qlora_dist.runtime.byte_sizes import align_bytes
from qlora_dist.shard_view import local_tensor

_STORE_CONTENT = "the base's layers"
_STORE_HINT = "name another folder in paging.dir, or raise parallel.resident_bytes"


@dataclass(frozen=True)
class _PageLocation:
    """Of a parameter's shard."""

    page: int
    start: int
    dtype: torch.dtype


class PagedLayers:
    """One page for each decoder layer: this rank's shards of its frozen parameters, one behind the other.

    Room for all of them is taken here, on the device and behind it; they are filled by `put`. The parameters themselves
    stay on meta: nothing but FSDP2's gathering sees a value.

    Args:
        model: sharded, on meta.
        layers: its decoder layers, in the order of forward.
        device: that uses them.
        resident_bytes: on the device, of at least two layers, or 0 for just two; all of them need no store. auto: half
            of what is free, after taking off the rest of the model, and of the adapters gradients and moments; the
            other half is for what comes on top while it computes.
        free_bytes: of the device, before anything is loaded.
        paging: where the others lie, and how many are fetched ahead.

    Raises:
        UserError: fewer bytes than two layers, or no room for the store.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[FSDPModule],
        device: torch.device,
        resident_bytes: int | Literal["auto"],
        free_bytes: int,
        paging: PagingConfig,
    ) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._places: dict[str, _PageLocation] = {}
        sizes = []
        for page, layer in enumerate(layers):
            end = 0
            for parameter, start, nbytes in frozen_shards(layer):
                self._places[names[id(parameter)]] = _PageLocation(page, start, parameter.dtype)
                end = start + align_bytes(nbytes)
            sizes.append(end)
        least = 2 * max(sizes)
        if resident_bytes == "auto":
            self.budget = max(least, (free_bytes - self._rest_bytes(model)) // 2)
        elif 0 < resident_bytes < min(least, sum(sizes)):
            raise UserError(
                f"parallel.resident_bytes: {resident_bytes} is less than two layers of the base, which take {least} "
                "bytes on each rank; raise it, or set it to 0 for just two"
            )
        else:
            self.budget = resident_bytes or least
        self.pager = Pager(
            sizes, device, self.budget, page_store_factory(paging, device, _STORE_CONTENT, _STORE_HINT), paging.ahead
        )
        for page, layer in enumerate(layers):
            self._attach(page, layer)

    @property
    def held_bytes(self) -> int:
        """On the device, now and at any moment."""
        return self.pager.held_bytes

    def sentence(self) -> str:
        """What lies where, for people."""
        count, moving = len(self.pager.sizes), len(self.pager.moving)
        if not moving:
            return f"paging: room for all {count} layers; nothing is fetched"
        return f"paging: {count - moving} of {count} layers stay, {moving} are fetched whenever they are used"

    def __contains__(self, name: str) -> bool:
        """Whether the parameter of that name is in a page."""
        return name in self._places

    def put(self, name: str, first: int, values: torch.Tensor) -> None:
        """Give elements of a parameter's shard their values, from `first` on: [n], of any type and device."""
        place = self._places[name]
        data = values.to(place.dtype).contiguous().view(torch.uint8)
        self.pager.write_part(place.page, place.start + first * place.dtype.itemsize, data)

    def close(self) -> None:
        """Give the room back. No layer can be used any more."""
        self.pager.close()

    def _rest_bytes(self, model: nn.Module) -> int:
        """Of this rank, between steps: what is in no page; of what is trained, values, gradients and two moments."""
        return sum(
            (4 if parameter.requires_grad else 1) * local_tensor(parameter).nbytes
            for name, parameter in model.named_parameters()
            if name not in self
        )

    def _attach(self, page: int, layer: FSDPModule) -> None:
        def get_page(which: PassDirection) -> torch.Tensor:
            return self.pager.use(page, prefetch_next=_next_pages(page, len(self.pager.sizes), which))

        def page_done(used: torch.Event | None) -> None:
            self.pager.done(page, dirty=False, used_event=used)

        page_frozen_parameters(layer, get_page, page_done)


def _next_pages(page: int, count: int, direction: PassDirection) -> list[int]:
    """The other pages, in the order in which they are used next.

    Down again after the way up, unless nothing will be differentiated: then from below. After the way down, up.
    """
    above, below = list(range(page + 1, count)), list(range(page))
    if direction == "backward":
        return below[::-1] + above
    return above + (below[::-1] if torch.is_grad_enabled() else below)
