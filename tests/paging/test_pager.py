"""If this fails, a page has other content than was last written to it, or the pager exceeds its budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.paging.page_store import FileStore, HostStore, PageStore
from qlora_dist.paging.pager import Pager

CPU = torch.device("cpu")


def make_store(nbytes: int) -> PageStore:
    return HostStore(nbytes, CPU)


class SlowStore(HostStore):
    """A store that takes `seconds` for each read."""

    def __init__(self, nbytes: int, seconds: float) -> None:
        super().__init__(nbytes, CPU)
        self.seconds = seconds

    def read(self, start: int, out: torch.Tensor) -> None:
        time.sleep(self.seconds)
        super().read(start, out)


def run_passes(pager: Pager, count: int, compute_s: float = 0.0) -> None:
    """Use all pages in order, `count` times, adding 1 to each byte."""
    pages = len(pager.sizes)
    for _ in range(count):
        for page in range(pages):
            pager.acquire(page, prefetch_next=[(page + i) % pages for i in range(1, pages)]).add_(1)
            time.sleep(compute_s)
            pager.release(page, dirty=True)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[int], int, int, list[tuple[str, int]]]:
    sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=8))
    budget = draw(st.one_of(st.just(0), st.integers(2 * max(sizes), sum(sizes) + 100)))
    moves = st.tuples(
        st.sampled_from(["change", "inspect", "read", "write", "resize"]), st.integers(0, 2 * max(sizes) * len(sizes))
    )
    return sizes, budget, draw(st.integers(0, 3)), draw(st.lists(moves, max_size=40))


@settings(deadline=None)
@given(histories())
def test_a_page_has_the_content_that_was_last_written(
    history: tuple[list[int], int, int, list[tuple[str, int]]],
) -> None:
    """Compare with plain tensors, for random uses, copies, replacements and budgets."""
    sizes, budget, ahead, moves = history
    pager = Pager(sizes, CPU, budget, make_store, ahead)
    plain = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    for count, (move, number) in enumerate(moves):
        page = number % len(sizes)
        if move in ("change", "inspect"):
            memory = pager.acquire(page, prefetch_next=[(page + 1 + i) % len(sizes) for i in range(number % 4)])
            assert torch.equal(memory, plain[page])
            if move == "change":
                memory.add_(count)
                plain[page].add_(count)
            pager.release(page, dirty=move == "change")
        elif move == "read":
            assert torch.equal(pager.read(page), plain[page])
        elif move == "write":
            plain[page] = torch.full((sizes[page],), count, dtype=torch.uint8)
            pager.write(page, plain[page])
        else:
            pager.resize(max(number, 2 * max(sizes)))
        assert pager.held_bytes <= max(budget if move != "resize" else number, 2 * max(sizes), pager._budget)
    assert all(torch.equal(pager.read(page), plain[page]) for page in range(len(sizes)))
    pager.close()


@settings(deadline=None)
@given(
    pages=st.integers(3, 12),
    size=st.integers(1, 1000),
    budget=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    ahead=st.integers(0, 2),
)
def test_each_pass_moves_the_bytes_of_the_paged_pages(pages: int, size: int, budget: float, ahead: int) -> None:
    """After the first pass each page is fetched once and written back once. The budget is never exceeded."""
    pager = Pager([size] * pages, CPU, max(2 * size, int(budget * pages * size)), make_store, ahead)
    assert pager.held_bytes <= pager._budget
    run_passes(pager, 1)
    pager.take_counts()
    for _ in range(3):
        run_passes(pager, 1)
        counts = pager.take_counts()
        assert counts.bytes_in == counts.bytes_out == size * len(pager.paged)
        assert counts.hits == pages - len(pager.paged)
    assert (pager.paged == []) == (budget == 1.0)
    pager.close()


def test_unchanged_pages_are_not_written_back() -> None:
    pager = Pager([10] * 5, CPU, 20, make_store)
    run_passes(pager, 1)
    for page in range(5):
        pager.write(page, torch.full((10,), page, dtype=torch.uint8))
    pager.take_counts()
    for page in [*range(5), *range(5)]:
        assert pager.acquire(page)[0] == page
        pager.release(page, dirty=False)
    counts = pager.take_counts()
    assert counts.bytes_in >= 80
    assert counts.bytes_out <= 20  # the slots held changed pages before
    pager.close()


def test_a_backward_pass_reuses_the_last_pages_of_the_forward_pass() -> None:
    """A model's layers are used in this order."""
    pager = Pager([10] * 6, CPU, 20, make_store, ahead=1)
    order = [*range(6), *reversed(range(6))]
    for _ in range(2):
        for index, page in enumerate(order):
            pager.acquire(page, prefetch_next=order[index + 1 : index + 2])
            pager.release(page, dirty=True)
        counts = pager.take_counts()
    assert counts.hits >= 2
    assert counts.bytes_in <= 100
    pager.close()


@given(pages=st.integers(3, 12), budget=st.integers(2, 12), ahead=st.integers(0, 4))
def test_forward_and_backward_fetch_all_but_the_pages_in_the_slots(pages: int, budget: int, ahead: int) -> None:
    """Each direction fetches the paged pages minus the number of slots. None is fetched too early or twice."""
    pager = Pager([10] * pages, CPU, 10 * budget, make_store, ahead)
    for page in range(pages):
        pager.write(page, torch.full((10,), page, dtype=torch.uint8))
    order = [*range(pages), *reversed(range(pages))]
    slots, paged = len(pager._slots), len(pager.paged)
    for first_time in (True, False, False):
        for index, page in enumerate(order):
            then = dict.fromkeys([*order[index + 1 :], *order[:index]])
            assert pager.acquire(page, prefetch_next=[other for other in then if other != page])[0] == page
            pager.release(page, dirty=False)
        fetched = 2 * (paged - slots) + (slots if first_time else 0)
        assert pager.take_counts().bytes_in == 10 * fetched
    pager.close()


def test_prefetching_hides_the_time_of_a_store() -> None:
    """With half the budget, prefetching at least halves the waiting time."""
    stalls = {}
    for ahead in (0, 1):
        pager = Pager([1000] * 12, CPU, 6000, lambda nbytes: SlowStore(nbytes, 0.004), ahead)
        run_passes(pager, 1)
        pager.take_counts()
        run_passes(pager, 3, compute_s=0.006)
        stalls[ahead] = pager.take_counts().stall_s
        pager.close()
    assert stalls[0] >= 3 * 8 * 0.004
    assert stalls[1] <= stalls[0] / 2


def test_a_budget_below_two_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="19 bytes are less than two pages of 10"):
        Pager([10] * 5, CPU, 19, make_store)


def test_a_failing_store_raises() -> None:
    class Failing(HostStore):
        def read(self, start: int, out: torch.Tensor) -> None:
            raise OSError("the disk is gone")

    pager = Pager([10] * 5, CPU, 20, lambda nbytes: Failing(nbytes, CPU))
    with pytest.raises(OSError, match="the disk is gone"):
        run_passes(pager, 3)
    pager.close()


def test_a_failed_write_raises_even_if_no_caller_waits_for_the_page() -> None:
    class Full(HostStore):
        def write(self, start: int, values: torch.Tensor) -> None:
            raise OSError("the disk is gone")

    pager = Pager([10] * 5, CPU, 20, lambda nbytes: Full(nbytes, CPU))
    pager.acquire(0, prefetch_next=[1])
    pager.release(0, dirty=True)
    pager.acquire(1, prefetch_next=[2])  # 2 replaces 0, whose write fails; 3 then replaces 2, which no caller waits for
    pager.release(1, dirty=False)
    pager.acquire(1, prefetch_next=[3])
    pager.release(1, dirty=False)
    with pytest.raises(OSError, match="the disk is gone"):
        pager.acquire(3)
    pager.close()


def test_a_page_can_be_written_in_parts() -> None:
    pager = Pager([10] * 6, CPU, 40, make_store)
    for page in range(6):
        for start in (0, 7):
            pager.write_part(page, start, torch.full((3,), page + start, dtype=torch.uint8))
    for page in range(6):
        expected = [page] * 3 + [0] * 4 + [page + 7] * 3
        assert pager.read(page).tolist() == pager.acquire(page).tolist() == expected
        pager.release(page, dirty=False)
    pager.close()


@pytest.fixture
def threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("threads")
def test_a_closed_pager_leaves_no_thread_and_no_file(tmp_path: Path) -> None:
    pager = Pager([10] * 5, CPU, 20, lambda nbytes: FileStore(nbytes, tmp_path, CPU, "pages", "no hint"))
    run_passes(pager, 2)
    pager.close()
    assert list(tmp_path.iterdir()) == []
