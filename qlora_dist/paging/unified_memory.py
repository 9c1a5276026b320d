"""Pages in CUDA's managed memory, which the driver moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qlora_dist.compat.bitsandbytes import functional as bnb
from qlora_dist.errors import UserError
from qlora_dist.paging.pager import PagingStats


def _allocate_managed(nbytes: int, device: torch.device) -> torch.Tensor:
    """Not run on a GPU."""
    memory: torch.Tensor = bnb.get_paged(nbytes, dtype=torch.uint8, device=device)
    bnb.fill(memory, 0)
    return memory


class UnifiedPager:
    """What `Pager` is, with nothing to decide: a page is used where it is, and the driver is told of the next one.

    What moves, and when, nobody counts. Only bitsandbytes' kernels take such memory, and kernels must have ended before
    the processor looks at it. Tried with ordinary memory in place of CUDA's only.

    Args:
        sizes: bytes of each page.
        device: that uses them.
        allocate: makes uint8[n] of zeros that both processor and device see.

    Raises:
        UserError: the device is no GPU.
    """

    held_bytes = 0
    """Nobody knows."""
    ahead = 1

    def __init__(
        self,
        sizes: Sequence[int],
        device: torch.device,
        allocate: Callable[[int, torch.device], torch.Tensor] | None = None,
    ) -> None:
        if allocate is None and device.type != "cuda":
            raise UserError("paging.to: unified memory is CUDA's, and this run is on a CPU; set it to host or disk")
        self.moving = list(range(len(sizes)))
        self.sizes, self.device = list(sizes), device
        self._pages = [(allocate or _allocate_managed)(size, device) for size in sizes]
        self._backend = torch.get_device_module(device)

    def use(self, page: int, prefetch_next: Sequence[int] = ()) -> torch.Tensor:
        """See `Pager`. The driver begins to move the first of `prefetch_next` to the device."""
        if prefetch_next and self.device.type == "cuda":
            bnb.prefetch_tensor(self._pages[prefetch_next[0]])
        return self._pages[page]

    def done(self, page: int, dirty: bool) -> None:
        """See `Pager`."""

    def read(self, page: int) -> torch.Tensor:
        """See `Pager`."""
        self._backend.synchronize()
        return self._pages[page].clone()

    def write(self, page: int, values: torch.Tensor) -> None:
        """See `Pager`."""
        self._backend.synchronize()
        self._pages[page].copy_(values)

    def resize(self, budget: int) -> None:
        """See `Pager`: the driver decides."""

    def take_counts(self) -> PagingStats:
        """See `Pager`: nothing is counted."""
        return PagingStats()

    def close(self) -> None:
        """Drop the pages; CUDA's go with the process."""
        self._pages = []
