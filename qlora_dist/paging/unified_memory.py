"""Pages in CUDA's managed memory, which the driver moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qlora_dist.compat.bitsandbytes import functional as bnb
from qlora_dist.errors import UserError
from qlora_dist.paging.pager import PagingStats


def _allocate_managed(nbytes: int, device: torch.device) -> torch.Tensor:
    memory: torch.Tensor = bnb.get_paged(nbytes, dtype=torch.uint8, device=device)
    bnb.fill(memory, 0)
    return memory


class UnifiedPager:
    """A `Pager` that leaves all decisions to the driver. It only announces the next page to the driver.

    The bytes that move are not counted. Only bitsandbytes' kernels take such memory, and the CPU may read it only
    after the kernels have ended. This was run with ordinary memory instead of CUDA's only.
    `allocate` returns uint8[n] of zeros that both CPU and device can access.
    """

    held_bytes = 0
    """Always 0, because the driver's share is not known."""
    ahead = 1

    def __init__(
        self,
        sizes: Sequence[int],
        device: torch.device,
        allocate: Callable[[int, torch.device], torch.Tensor] | None = None,
    ) -> None:
        if allocate is None and device.type != "cuda":
            raise UserError("paging.to: unified memory is CUDA's, and this run is on a CPU; set it to host or disk")
        self.paged = list(range(len(sizes)))
        self.sizes, self.device = list(sizes), device
        self._pages = [(allocate or _allocate_managed)(size, device) for size in sizes]
        self._backend = torch.get_device_module(device)

    def acquire(self, page: int, prefetch_next: Sequence[int] = ()) -> torch.Tensor:
        """Return a page, as `Pager` does. The driver begins to move the first of `prefetch_next` to the device."""
        if prefetch_next and self.device.type == "cuda":
            bnb.prefetch_tensor(self._pages[prefetch_next[0]])
        return self._pages[page]

    def release(self, page: int, *, dirty: bool) -> None:
        """Do nothing, because the driver moves the pages."""

    def read(self, page: int) -> torch.Tensor:
        self._backend.synchronize()
        return self._pages[page].clone()

    def write(self, page: int, values: torch.Tensor) -> None:
        self._backend.synchronize()
        self._pages[page].copy_(values)

    def resize(self, budget: int) -> None:
        """Do nothing, because the driver decides."""

    def take_counts(self) -> PagingStats:
        return PagingStats()

    def close(self) -> None:
        """Drop the pages. CUDA frees managed memory when the process ends."""
        self._pages = []
