"""Pages of which a byte budget stays on the device, the others coming and going."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.profiler import record_function

from qlora_dist.paging.page_store import PageStore
from qlora_dist.runtime.threads import background_executor


@dataclass
class PagingStats:
    """What a pager has done since they were last taken."""

    hits: int = 0
    """Uses of a page that was on the device since it was last used."""
    bytes_in: int = 0
    """Fetched from the store, ahead or not."""
    bytes_out: int = 0
    """Written to the store."""
    stall_s: float = 0.0
    """Seconds in which the caller waited for a page."""


@dataclass(eq=False)
class _Slot:
    """Room on the device for one page after the other."""

    memory: torch.Tensor
    page: int | None = None
    dirty: bool = False
    in_use: bool = False
    prefetched: bool = False
    """And not used yet."""
    transfer: Future[None] | None = None
    used: torch.Event | None = None
    """When another stream than the caller's has done with it."""


class Pager:
    """Pages that are used in an order that the caller knows.

    As many pages as the budget has room for stay on the device for good, every so-and-so-many-th one, so that there is
    time to move the others. These go through a few slots: while one is used, a thread writes back the one before it, if
    it was changed, and fetches those that come next, on a stream of its own.

    Args:
        sizes: bytes of each page.
        device: that uses them.
        budget: bytes on the device at any moment; at least two pages, or 0 for just that. Room for all: all stay.
        make_store: makes a store of so many bytes; called only if not all pages stay.
        ahead: pages to be fetched ahead at most; 0: none is.

    Raises:
        ValueError: the budget is less than two pages.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        device: torch.device,
        budget: int,
        make_store: Callable[[int], PageStore],
        ahead: int = 1,
    ) -> None:
        self.sizes, self.device, self.ahead = list(sizes), device, ahead
        self.counts = PagingStats()
        self.held_bytes = 0
        """On the device now."""
        self.moving: list[int] = []
        """The pages that do not stay."""
        self._starts = [0, *accumulate(self.sizes)]
        self._make_store, self._store = make_store, None  # type: Callable[[int], PageStore], PageStore | None
        self._backend = torch.get_device_module(device)
        self._stream = self._backend.Stream()
        self._thread = background_executor("pager")
        self._resident: dict[int, torch.Tensor] = {}
        self._slots: list[_Slot] = []
        self._stored: set[int] = set()  # pages that the store has; the others are zeros
        self._assign_pages(budget)

    @property
    def total_bytes(self) -> int:
        """Of all pages."""
        return sum(self.sizes)

    def use(self, page: int, prefetch_next: Sequence[int] = ()) -> torch.Tensor:
        """A page on the device, to be read and changed until `done`.

        Args:
            page: its number.
            prefetch_next: the pages that will be used next, in their order: fetching begins, as far as there are free slots.

        Returns:
            uint8[sizes[page]].

        Raises:
            OSError: the store fails.
        """
        if page in self._resident:
            self.counts.hits += 1
            if prefetch_next:
                self._prefetch(page, prefetch_next)
            return self._resident[page]
        slot = self._find_slot(page)
        if slot is None:
            slot = self._free_slot({page})
            assert slot is not None, "more pages are in use at a time than there are slots"
            self._start_transfer(slot, page)
        elif not slot.prefetched:
            self.counts.hits += 1
        slot.in_use, slot.prefetched = True, False
        self._mark_most_recent(slot)
        self._prefetch(page, prefetch_next)
        self._wait(slot)
        return slot.memory[: self.sizes[page]]

    def done(self, page: int, dirty: bool, used_event: torch.Event | None = None) -> None:
        """Say that a page is not in use any more.

        Args:
            page: its number.
            dirty: since `use`.
            used_event: what the device has to come to first, if that is not on the stream that is current here.
        """
        slot = self._find_slot(page)
        if slot is not None:
            slot.in_use, slot.used = False, used_event
            slot.dirty = slot.dirty or dirty

    def read(self, page: int) -> torch.Tensor:
        """A copy of a page on the CPU: uint8[sizes[page]]. Counts as no use."""
        self._wait_for_transfers()
        slot = self._find_slot(page)
        if page in self._resident:
            return self._resident[page].to("cpu", copy=True)
        if slot is not None:
            return slot.memory[: self.sizes[page]].to("cpu", copy=True)
        out = torch.zeros(self.sizes[page], dtype=torch.uint8)
        if page in self._stored:
            assert self._store is not None
            self._store.read(self._starts[page], out)
        return out

    def write(self, page: int, values: torch.Tensor) -> None:
        """Replace a page by uint8[sizes[page]] of the CPU. Counts as no use."""
        self._wait_for_transfers()
        slot = self._find_slot(page)
        if page in self._resident:
            self._resident[page].copy_(values)
        elif slot is not None:
            slot.memory[: self.sizes[page]].copy_(values)
            slot.dirty = True
        else:
            assert self._store is not None
            self._store.write(self._starts[page], values)
            self._stored.add(page)

    def write_part(self, page: int, start: int, values: torch.Tensor) -> None:
        """Replace bytes of a page, from `start` on, by uint8[n] of any device. Counts as no use, as long as none is."""
        if page in self._resident:
            self._resident[page][start : start + values.numel()].copy_(values)
            return
        assert self._store is not None and self._find_slot(page) is None, "pages are in use"
        self._store.write(self._starts[page] + start, values.cpu())
        self._stored.add(page)

    def resize(self, budget: int) -> None:
        """Keep to another budget from now on; no page may be in use.

        Raises:
            ValueError: the budget is less than two pages.
        """
        device_pages = [*self._resident, *(slot.page for slot in self._slots if slot.page is not None)]
        pages = {page: self.read(page) for page in device_pages}
        self._resident, self._slots, self.held_bytes = {}, [], 0
        self._assign_pages(budget)
        for page, memory in self._resident.items():
            if page not in pages and page in self._stored and self._store is not None:
                self._store.read(self._starts[page], memory)
        for page, values in pages.items():
            self.write(page, values)

    def take_counts(self) -> PagingStats:
        """What was done since the last call."""
        counts, self.counts = self.counts, PagingStats()
        return counts

    def close(self) -> None:
        """End the thread, and give the store's room back."""
        self._thread.shutdown(cancel_futures=True)
        if self._store is not None:
            self._store.close()
            self._store = None

    def _assign_pages(self, budget: int) -> None:
        """Decide which pages stay, and make the slots."""
        if self.total_bytes <= budget or not self.sizes:
            self._budget = budget
            self._resident, self.moving = {page: self._allocate(size) for page, size in enumerate(self.sizes)}, []
            return
        largest, count = max(self.sizes), len(self.sizes)
        self._budget = budget or 2 * largest
        if self._budget < 2 * largest:
            raise ValueError(f"{budget} bytes are less than two pages of {largest}")
        slots = min(max(2, 1 + self.ahead), self._budget // largest)
        resident_count = (self._budget - slots * largest) // largest
        if self._store is None:
            self._store = self._make_store(self.total_bytes)
        self._slots = [_Slot(self._allocate(largest)) for _ in range(slots)]
        for page in range(count):
            if (page + 1) * resident_count // count > page * resident_count // count:
                self._resident[page] = self._allocate(self.sizes[page])
        self.moving = [page for page in range(count) if page not in self._resident]

    def _allocate(self, nbytes: int) -> torch.Tensor:
        self.held_bytes += nbytes
        if self.held_bytes > self._budget:
            raise AssertionError(f"the pager holds {self.held_bytes} bytes and has a budget of {self._budget}")
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def _prefetch(self, page: int, then: Sequence[int]) -> None:
        next_pages = [next_page for next_page in then if next_page not in self._resident][: self.ahead]
        for next_page in next_pages:
            if self._find_slot(next_page) is None:
                slot = self._free_slot({page, *next_pages})
                if slot is None:
                    return
                self._start_transfer(slot, next_page)

    def _free_slot(self, keep: set[int]) -> _Slot | None:
        """The slot that has not been used for longest, of those that are not in use and hold none of `keep`."""
        for slot in self._slots:
            if not slot.in_use and slot.page not in keep:
                return slot
        return None

    def _mark_most_recent(self, slot: _Slot) -> None:
        """The slots are in the order of their last use."""
        self._slots.remove(slot)
        self._slots.append(slot)

    def _find_slot(self, page: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.page == page), None)

    def _start_transfer(self, slot: _Slot, page: int) -> None:
        """Begin to write back what a slot holds, if it was changed, and to fetch a page into it."""
        old, new = slot.page if slot.dirty else None, page if page in self._stored else None
        if old is not None:
            self.counts.bytes_out += self.sizes[old]
            self._stored.add(old)
        if new is not None:
            self.counts.bytes_in += self.sizes[new]
        # the device may not have come to the last use of the slot yet
        used = [slot.used, self._backend.current_stream().record_event()]
        slot.page, slot.dirty, slot.prefetched, slot.used = page, False, True, None
        self._mark_most_recent(slot)
        slot.transfer = self._thread.submit(self._transfer, slot.memory, old, page, new is None, used, slot.transfer)

    def _transfer(
        self,
        memory: torch.Tensor,
        old: int | None,
        new: int,
        blank: bool,
        used: list[torch.Event | None],
        before: Future[None] | None,
    ) -> None:
        """In the thread. `before`: the slot's last one, for a page that nobody waited for; its error is ours."""
        assert self._store is not None
        if before is not None:
            before.result()
        with self._backend.stream(self._stream):
            for event in filter(None, used):
                self._stream.wait_event(event)
            if old is not None:
                self._store.write(self._starts[old], memory[: self.sizes[old]])
            if blank:
                memory.zero_()
            else:
                self._store.read(self._starts[new], memory[: self.sizes[new]])
            moved = self._backend.Event()
            moved.record(self._stream)
            moved.synchronize()

    def _wait(self, slot: _Slot) -> None:
        if slot.transfer is not None:
            started = time.perf_counter()
            with record_function("qlora_dist::page"):  # as `train/step_profiler.py` knows it
                slot.transfer.result()
            self.counts.stall_s += time.perf_counter() - started
            slot.transfer = None

    def _wait_for_transfers(self) -> None:
        for slot in self._slots:
            if slot.transfer is not None:
                slot.transfer.result()
