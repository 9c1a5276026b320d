"""The frozen decoder layers as pages: some stay on the device, and the others are fetched ahead of their use."""

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


@dataclass(frozen=True)
class _PageLocation:
    """Place of a parameter's shard in its page."""

    page: int
    start: int
    dtype: torch.dtype


class PagedLayers:
    """A page per decoder layer with this rank's shards of the layer's frozen parameters.

    The constructor allocates all pages, on the device and in the store, and `write` fills them. The parameters stay on
    the meta device, and only FSDP2's gathering reads values.

    With `resident_bytes: auto`, the pages on the device take half of the free bytes. The rest of the model, gradients
    and optimizer states are subtracted before. The other half is for activations.

    Args:
        model: sharded model on the meta device.
        layers: the decoder layers in the order of forward.
        device: device that uses the layers.
        resident_bytes: bytes of pages on the device, at least two layers; 0: exactly two layers. If all layers fit,
            there is no store.
        free_bytes: free bytes of the device before loading.
        paging: the section `paging`.
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
        self._locations: dict[str, _PageLocation] = {}
        sizes = []
        for page, layer in enumerate(layers):
            end = 0
            for parameter, start, nbytes in frozen_shards(layer):
                self._locations[names[id(parameter)]] = _PageLocation(page, start, parameter.dtype)
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
        hint = "name another folder in paging.dir, or raise parallel.resident_bytes"
        make_store = page_store_factory(paging, device, "the base's layers", hint)
        self.pager = Pager(sizes, device, self.budget, make_store, paging.ahead)
        for page, layer in enumerate(layers):
            self._attach(page, layer)

    @property
    def held_bytes(self) -> int:
        """Bytes of pages on the device; they do not change."""
        return self.pager.held_bytes

    def sentence(self) -> str:
        count, paged = len(self.pager.sizes), len(self.pager.paged)
        if not paged:
            return f"paging: room for all {count} layers; nothing is fetched"
        return f"paging: {count - paged} of {count} layers stay, {paged} are fetched whenever they are used"

    def __contains__(self, name: str) -> bool:
        return name in self._locations

    def write(self, name: str, first: int, values: torch.Tensor) -> None:
        """Write values, [n] of any dtype and device, to a parameter's shard from element `first` on."""
        location = self._locations[name]
        data = values.to(location.dtype).contiguous().view(torch.uint8)
        self.pager.write_part(location.page, location.start + first * location.dtype.itemsize, data)

    def close(self) -> None:
        """Free all pages. No layer can be used afterwards."""
        self.pager.close()

    def _rest_bytes(self, model: nn.Module) -> int:
        """Return the bytes outside pages; trained parameters also have gradients, `exp_avg` and `exp_avg_sq`."""
        return sum(
            (4 if parameter.requires_grad else 1) * local_tensor(parameter).nbytes
            for name, parameter in model.named_parameters()
            if name not in self
        )

    def _attach(self, page: int, layer: FSDPModule) -> None:
        def acquire_page(direction: PassDirection) -> torch.Tensor:
            return self.pager.acquire(page, prefetch_next=_next_pages(page, len(self.pager.sizes), direction))

        def release_page(used_event: torch.Event | None) -> None:
            self.pager.release(page, dirty=False, used_event=used_event)

        page_frozen_parameters(layer, acquire_page, release_page)


def _next_pages(page: int, count: int, direction: PassDirection) -> list[int]:
    """Return the other pages in the order of their next use.

    Backward follows forward unless gradients are disabled; then the next forward follows.
    """
    above, below = list(range(page + 1, count)), list(range(page))
    if direction == "backward":
        return below[::-1] + above
    return above + (below[::-1] if torch.is_grad_enabled() else below)
