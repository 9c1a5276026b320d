"""Pages of which some stay on the device within a byte budget, and the others are fetched when they are used."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch.profiler import record_function

from qlora_dist.paging.page_store import PageStore
from qlora_dist.runtime.threads import background_executor


@dataclass
class PagingStats:
    """Counts of a pager's work since they were last taken."""

    hits: int = 0
    """Uses of a page that had stayed on the device since its last use."""
    bytes_in: int = 0
    """Bytes fetched from the store, prefetched or not."""
    bytes_out: int = 0
    """Bytes written to the store."""
    stall_s: float = 0.0
    """Seconds that the caller waited for pages."""


@dataclass(eq=False, kw_only=True)
class _Slot:
    """Memory on the device that holds one page at a time."""

    memory: torch.Tensor
    page: int | None = None
    dirty: bool = False
    in_use: bool = False
    prefetched: bool = False
    """Whether the page was fetched and has not been used since."""
    transfer: Future[None] | None = None
    used_event: torch.Event | None = None
    """Event after the last use, if that was on another stream than the caller's."""


class Pager:
    """Pages on a device, for a caller that can say which pages it uses next.

    As many pages as the budget allows are resident: they stay on the device. They are spread evenly over the order, so
    that there is time to move the others. The others, the paged ones, share a few slots. While one is used, a thread
    with its own stream writes the previous one back, if it was changed, and fetches the next ones.

    Args:
        sizes: bytes of each page.
        device: device that uses the pages.
        budget: most bytes on the device at any time; at least two pages, or 0 for exactly two. If all pages fit, all
            are resident.
        make_store: returns a store of the given bytes; called only if not all pages are resident.
        ahead: most pages to prefetch; 0: none.

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
        """Bytes on the device now."""
        self.paged: list[int] = []
        """Pages that are not resident."""
        self._starts = [0, *accumulate(self.sizes)]
        self._make_store, self._store = make_store, None  # type: Callable[[int], PageStore], PageStore | None
        self._backend = torch.get_device_module(device)
        self._stream = self._backend.Stream()
        self._thread = background_executor("pager")
        self._resident: dict[int, torch.Tensor] = {}
        self._slots: list[_Slot] = []
        self._stored: set[int] = set()  # pages that were written to the store; the others are zeros
        self._assign_pages(budget)

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes)

    def acquire(self, page: int, prefetch_next: Sequence[int] = ()) -> torch.Tensor:
        """Return a page on the device, uint8[sizes[page]]. The caller may read and change it until `release`.

        `prefetch_next` are the pages that are used next, in order. They are prefetched as far as there are free slots.

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

    def release(self, page: int, *, dirty: bool, used_event: torch.Event | None = None) -> None:
        """End the use of a page, which is dirty if it was changed since `acquire`.

        `used_event` is the event after the last use, if that was on another stream than the current one.
        """
        slot = self._find_slot(page)
        if slot is not None:
            slot.in_use, slot.used_event = False, used_event
            slot.dirty = slot.dirty or dirty

    def read(self, page: int) -> torch.Tensor:
        """Return a copy of a page on the CPU, uint8[sizes[page]]. This does not count as a use."""
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
        """Replace a page by uint8[sizes[page]] on the CPU. This does not count as a use."""
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
        """Replace bytes of a page, from `start` on, by uint8[n] on any device. No page may have been used yet."""
        if page in self._resident:
            self._resident[page][start : start + values.numel()].copy_(values)
            return
        assert self._store is not None and self._find_slot(page) is None, "pages are in use"
        self._store.write(self._starts[page] + start, values.cpu())
        self._stored.add(page)

    def resize(self, budget: int) -> None:
        """Change the budget. No page may be in use."""
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
        """Return the counts since the last call, and reset them."""
        counts, self.counts = self.counts, PagingStats()
        return counts

    def close(self) -> None:
        """End the thread, and free the store."""
        self._thread.shutdown(cancel_futures=True)
        if self._store is not None:
            self._store.close()
            self._store = None

    def _assign_pages(self, budget: int) -> None:
        """Decide which pages are resident, and allocate the slots."""
        if self.total_bytes <= budget or not self.sizes:
            self._budget = budget
            self._resident, self.paged = {page: self._allocate(size) for page, size in enumerate(self.sizes)}, []
            return
        largest, count = max(self.sizes), len(self.sizes)
        self._budget = budget or 2 * largest
        if self._budget < 2 * largest:
            raise ValueError(f"{budget} bytes are less than two pages of {largest}")
        slots = min(max(2, 1 + self.ahead), self._budget // largest)
        resident_count = (self._budget - slots * largest) // largest
        if self._store is None:
            self._store = self._make_store(self.total_bytes)
        self._slots = [_Slot(memory=self._allocate(largest)) for _ in range(slots)]
        for page in range(count):
            if (page + 1) * resident_count // count > page * resident_count // count:
                self._resident[page] = self._allocate(self.sizes[page])
        self.paged = [page for page in range(count) if page not in self._resident]

    def _allocate(self, nbytes: int) -> torch.Tensor:
        self.held_bytes += nbytes
        if self.held_bytes > self._budget:
            raise AssertionError(f"the pager holds {self.held_bytes} bytes and has a budget of {self._budget}")
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def _prefetch(self, page: int, upcoming: Sequence[int]) -> None:
        next_pages = [next_page for next_page in upcoming if next_page not in self._resident][: self.ahead]
        for next_page in next_pages:
            if self._find_slot(next_page) is None:
                slot = self._free_slot({page, *next_pages})
                if slot is None:
                    return
                self._start_transfer(slot, next_page)

    def _free_slot(self, keep: set[int]) -> _Slot | None:
        """Return the least recently used slot that is not in use and holds no page of `keep`."""
        for slot in self._slots:
            if not slot.in_use and slot.page not in keep:
                return slot
        return None

    def _mark_most_recent(self, slot: _Slot) -> None:
        """Move a slot to the end: the slots are in the order of their last use."""
        self._slots.remove(slot)
        self._slots.append(slot)

    def _find_slot(self, page: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.page == page), None)

    def _start_transfer(self, slot: _Slot, page: int) -> None:
        """Begin to write the slot's page back, if it was changed, and to fetch another page into the slot."""
        old, new = slot.page if slot.dirty else None, page if page in self._stored else None
        if old is not None:
            self.counts.bytes_out += self.sizes[old]
            self._stored.add(old)
        if new is not None:
            self.counts.bytes_in += self.sizes[new]
        # the device may still be busy with the last use of the slot
        used = [slot.used_event, self._backend.current_stream().record_event()]
        slot.page, slot.dirty, slot.prefetched, slot.used_event = page, False, True, None
        self._mark_most_recent(slot)
        transfer = partial(self._transfer, slot.memory, old, page, blank=new is None, used=used, before=slot.transfer)
        slot.transfer = self._thread.submit(transfer)

    def _transfer(
        self,
        memory: torch.Tensor,
        old: int | None,
        new: int,
        *,
        blank: bool,
        used: list[torch.Event | None],
        before: Future[None] | None,
    ) -> None:
        """Move pages in the thread.

        `before` is the slot's transfer before this one, if no caller waited for its page. Its error is raised here.
        """
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
            with record_function("qlora_dist::page"):  # the name that `train/step_profiler.py` looks for
                slot.transfer.result()
            self.counts.stall_s += time.perf_counter() - started
            slot.transfer = None

    def _wait_for_transfers(self) -> None:
        for slot in self._slots:
            if slot.transfer is not None:
                slot.transfer.result()
