"""The states of AdamW (`exp_avg`, `exp_avg_sq`) for the shards of a rank, split into pages."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

import torch

from qlora_dist.config.sections import OptimConfig, PagingConfig
from qlora_dist.errors import UserError
from qlora_dist.optim.state_pages import STATE_BLOCK_SIZE, PageSlice, StatePage, page_layout
from qlora_dist.paging.page_store import page_store_factory
from qlora_dist.paging.pager import Pager
from qlora_dist.paging.unified_memory import UnifiedPager

STATE_NAMES = ("exp_avg", "exp_avg_sq")
"""First and second moment of a shard with n elements: fp32[n].

In 8 bit they are uint8[n], and NAME.absmax is fp32[ceil(n / STATE_BLOCK_SIZE)] beside each."""


def state_tensor_names(bits: int) -> tuple[str, ...]:
    """Return the names of the tensors that make up a shard's state."""
    return STATE_NAMES if bits == 32 else (*STATE_NAMES, *(f"{name}.absmax" for name in STATE_NAMES))


_UNLIMITED = 2**62


class PagedOptimizerState:
    """The states of a rank's shards, on the device or paged. `sizes` are the elements of each shard.

    A store that has no room, or does not exist, is a `UserError`.
    """

    def __init__(self, sizes: Sequence[int], config: OptimConfig, paging: PagingConfig, device: torch.device) -> None:
        self.bits = 8 if config.name.endswith("8bit") else 32
        self.pages = page_layout(sizes, self.bits, paging.page_bytes)
        self._num_shards = len(sizes)
        self.is_automatic = config.name.startswith("paged") and config.resident_bytes == "auto"
        self._is_resized = False
        self.pager = _open_pager([page.nbytes for page in self.pages], config, paging, device)

    @property
    def is_unified(self) -> bool:
        """Whether the pages lie in CUDA's managed memory, which the driver moves."""
        return isinstance(self.pager, UnifiedPager)

    @property
    def resident_bytes(self) -> int:
        """Bytes on the device now."""
        return self.pager.held_bytes

    @property
    def paged_bytes(self) -> int:
        """Bytes of the pages that do not stay on the device."""
        return sum(self.pager.sizes[page] for page in self.pager.paged)

    def needs_resize(self, available_bytes: int) -> bool:
        """Return whether to call `resize`: the first time, and when the device has less room than the states take."""
        return not self._is_resized or available_bytes < self.pager.held_bytes

    def resize(self, available_bytes: int) -> None:
        """Hold at most `available_bytes` on the device from now on. The pages move in memory."""
        self._is_resized = True
        self.pager.resize(available_bytes if available_bytes >= 2 * max(self.pager.sizes, default=0) else 0)

    def acquire(self, number: int) -> torch.Tensor:
        """Return page `number` on the device, uint8[nbytes], for changes until `release`. Prefetches the next pages."""
        paged = self.pager.paged
        after, count = bisect_right(paged, number), min(self.pager.ahead, len(paged))
        return self.pager.acquire(number, prefetch_next=[paged[(after + i) % len(paged)] for i in range(count)])

    def release(self, number: int) -> None:
        self.pager.release(number, dirty=True)

    def read(self) -> list[dict[str, torch.Tensor]]:
        """Return copies of each shard's state on the CPU, flat, by `state_tensor_names`; an empty shard has none."""
        parts: list[dict[str, list[torch.Tensor]]] = [{} for _ in range(self._num_shards)]
        for number, page in enumerate(self.pages):
            memory = self.pager.read(number)
            for piece in page.slices:
                for name, view in _views(memory, page, piece, self.bits).items():
                    parts[piece.shard].setdefault(name, []).append(view)
        return [{name: torch.cat(views) for name, views in shard.items()} for shard in parts]

    def write(self, shards: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Replace all states by what `read` returned. Takes one shard at a time, in their order."""
        values = enumerate(shards)
        shard, state = -1, dict[str, torch.Tensor]()  # type: int, Mapping[str, torch.Tensor]
        for number, page in enumerate(self.pages):
            memory = torch.zeros(page.nbytes, dtype=torch.uint8)
            for piece in page.slices:
                while shard < piece.shard:
                    shard, state = next(values)
                for name, view in _views(memory, page, piece, self.bits).items():
                    start = piece.start // (STATE_BLOCK_SIZE if name.endswith(".absmax") else 1)
                    view.copy_(state[name].view(-1)[start : start + view.numel()])
            self.pager.write(number, memory)

    def views(self, memory: torch.Tensor, number: int, piece: PageSlice, shape: torch.Size) -> dict[str, torch.Tensor]:
        """Return the state of a slice in page `number`, as the update kernels take it.

        `memory` is the page's, uint8[nbytes]. The views `STATE_NAMES` have the slice's `shape`.
        """
        views = _views(memory, self.pages[number], piece, self.bits)
        views |= {name: views[name].view(shape) for name in STATE_NAMES}
        if self.is_unified:
            for view in views.values():
                # Managed memory is a tensor on the CPU. Without bitsandbytes' mark its kernels refuse it beside a
                # gradient on the GPU. The mark is an attribute, which every further view would lose.
                view.is_paged = True  # type: ignore[attr-defined]
        return views

    def close(self) -> None:
        """Free all pages."""
        self.pager.close()


def _views(memory: torch.Tensor, page: StatePage, piece: PageSlice, bits: int) -> dict[str, torch.Tensor]:
    # a page holds all `exp_avg`, then all `exp_avg_sq`; in 8 bit the codes of both, then the absmax of both
    n, begin, end = page.elements, piece.page_start, piece.page_start + piece.length
    if bits == 32:
        return {name: memory.view(torch.float32)[k * n + begin : k * n + end] for k, name in enumerate(STATE_NAMES)}
    blocks = slice(begin // STATE_BLOCK_SIZE, -(-end // STATE_BLOCK_SIZE))
    absmax = memory[2 * n :].view(torch.float32).view(2, n // STATE_BLOCK_SIZE)
    views = {name: memory[k * n + begin : k * n + end] for k, name in enumerate(STATE_NAMES)}
    return views | {f"{name}.absmax": absmax[k, blocks] for k, name in enumerate(STATE_NAMES)}


def _open_pager(
    sizes: Sequence[int], config: OptimConfig, paging: PagingConfig, device: torch.device
) -> Pager | UnifiedPager:
    if paging.to == "unified" and config.name.startswith("paged"):
        return UnifiedPager(sizes, device)
    budget = _UNLIMITED
    if config.name.startswith("paged"):
        budget = 0 if config.resident_bytes == "auto" else config.resident_bytes
    make_store = page_store_factory(
        paging, device, "optimizer states", "set paging.dir to another folder, or raise optim.resident_bytes"
    )
    try:
        return Pager(sizes, device, budget, make_store, paging.ahead)
    except torch.OutOfMemoryError:
        raise UserError(
            f"optim.resident_bytes: the device has no room for {min(budget, sum(sizes)) / 2**30:.3g} GiB of optimizer "
            "states; lower it"
        ) from None
