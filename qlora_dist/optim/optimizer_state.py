"""Both moments of AdamW for the shards of a rank: one run of blocks, cut into pages."""

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
"""First and second, of a shard's elements each: fp32[n]; in 8 bit uint8[n], and beside them NAME.absmax,
fp32[ceil(n / BLOCK)]."""


def state_tensor_names(bits: int) -> tuple[str, ...]:
    """Of the tensors that make up a shard's moments."""
    return STATE_NAMES if bits == 32 else (*STATE_NAMES, *(f"{name}.absmax" for name in STATE_NAMES))


_UNLIMITED = 2**62
_STORE_CONTENT = "optimizer states"
_STORE_HINT = "set paging.dir to another folder, or raise optim.resident_bytes"


class PagedOptimizerState:
    """The moments, wherever they lie.

    Args:
        sizes: elements of each of the rank's shards.
        config: name of the optimizer, and bytes that stay on the device.
        paging: where the others go.
        device: of the shards.

    Raises:
        UserError: there is no room behind the device, or no such place.
    """

    def __init__(self, sizes: Sequence[int], config: OptimConfig, paging: PagingConfig, device: torch.device) -> None:
        self.bits = 8 if config.name.endswith("8bit") else 32
        self.pages = page_layout(sizes, self.bits, paging.page_bytes)
        self._shards = len(sizes)
        self.is_automatic = config.name.startswith("paged") and config.resident_bytes == "auto"
        self._is_resized = False
        self.pager = _open_pager([page.nbytes for page in self.pages], config, paging, device)

    @property
    def is_unified(self) -> bool:
        """Whether the driver moves the pages, of CUDA's managed memory."""
        return isinstance(self.pager, UnifiedPager)

    @property
    def resident_bytes(self) -> int:
        """On the device now."""
        return self.pager.held_bytes

    @property
    def paged_bytes(self) -> int:
        """Of the pages that come and go."""
        return sum(self.pager.sizes[page] for page in self.pager.moving)

    def needs_resize(self, available_bytes: int) -> bool:
        """Whether to `fit`: the first time it is known what the device has left, and when that is less than is held."""
        return not self._is_resized or available_bytes < self.pager.held_bytes

    def fit(self, available_bytes: int) -> None:
        """Keep to what the device has left. The pages lie elsewhere afterwards."""
        self._is_resized = True
        self.pager.resize(available_bytes if available_bytes >= 2 * max(self.pager.sizes, default=0) else 0)

    def use(self, number: int) -> torch.Tensor:
        """Page `number` on the device: uint8[nbytes], to be changed until `done`; those behind it are fetched."""
        moving = self.pager.moving
        after, count = bisect_right(moving, number), min(self.pager.ahead, len(moving))
        return self.pager.use(number, prefetch_next=[moving[(after + i) % len(moving)] for i in range(count)])

    def done(self, number: int) -> None:
        """Say that page `number` has been changed, and is not in use any more."""
        self.pager.done(number, dirty=True)

    def read(self) -> list[dict[str, torch.Tensor]]:
        """Copies on the CPU of each shard's moments, flat, by `state_tensor_names`; nothing for an empty one."""
        parts: list[dict[str, list[torch.Tensor]]] = [{} for _ in range(self._shards)]
        for number, page in enumerate(self.pages):
            memory = self.pager.read(number)
            for piece in page.pieces:
                for name, view in _views(memory, page, piece, self.bits).items():
                    parts[piece.shard].setdefault(name, []).append(view)
        return [{name: torch.cat(views) for name, views in shard.items()} for shard in parts]

    def write(self, shards: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Replace all moments by what `read` gave, here or elsewhere. Takes one shard at a time, in their order."""
        values = enumerate(shards)
        shard, moments = -1, dict[str, torch.Tensor]()  # type: int, Mapping[str, torch.Tensor]
        for number, page in enumerate(self.pages):
            memory = torch.zeros(page.nbytes, dtype=torch.uint8)
            for piece in page.pieces:
                while shard < piece.shard:
                    shard, moments = next(values)
                for name, view in _views(memory, page, piece, self.bits).items():
                    start = piece.start // (STATE_BLOCK_SIZE if name.endswith(".absmax") else 1)
                    view.copy_(moments[name].view(-1)[start : start + view.numel()])
            self.pager.write(number, memory)

    def views(self, memory: torch.Tensor, number: int, piece: PageSlice, shape: torch.Size) -> dict[str, torch.Tensor]:
        """Return the moments of a piece in page `number`, as the update kernels take them.

        Args:
            memory: uint8[nbytes], where the page lies.
            number: of the page.
            piece: part of a shard.
            shape: of the part of the parameter, which `STATE_NAMES` take on.
        """
        views = _views(memory, self.pages[number], piece, self.bits)
        views |= {name: views[name].view(shape) for name in STATE_NAMES}
        if self.is_unified:
            for view in views.values():
                # bitsandbytes' mark is an attribute, which every further view would lose; without it the kernels
                # refuse managed memory, a tensor on the CPU, beside a gradient on the GPU
                view.is_paged = True  # type: ignore[attr-defined]
        return views

    def close(self) -> None:
        """Give all room back."""
        self.pager.close()


def _views(memory: torch.Tensor, page: StatePage, piece: PageSlice, bits: int) -> dict[str, torch.Tensor]:
    """A page holds all first moments, then all second; in 8 bit both codes, then both absmax."""
    n, begin, end = page.elements, piece.at, piece.at + piece.length
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
    make_store = page_store_factory(paging, device, _STORE_CONTENT, _STORE_HINT)
    try:
        return Pager(sizes, device, budget, make_store, paging.ahead)
    except torch.OutOfMemoryError:
        raise UserError(
            f"optim.resident_bytes: the device has no room for {min(budget, sum(sizes)) / 2**30:.3g} GiB of optimizer "
            "states; lower it"
        ) from None
