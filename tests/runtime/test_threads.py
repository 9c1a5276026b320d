"""If this fails, quantizing on several cores hangs or gives other bytes than on one, or our threads slow torch's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_dist.nf4.quantize import quantize_weight
from qlora_dist.runtime.threads import background_executor, parallel_for_each

THREADS = 3


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("numel", [5 * 2**20, 2**20 + 64 * 3, 2**21 + 7])
def test_bytes_equal_bitsandbytes(numel: int, quant_type: str) -> None:
    weight = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).bfloat16()
    packed, layout = quantize_weight(weight, quant_type)  # type: ignore[arg-type]
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=quant_type)
    assert torch.equal(packed[layout.codes], codes.flatten())
    assert torch.equal(packed[layout.absmax], state.absmax)
    torch.set_num_threads(1)
    assert torch.equal(quantize_weight(weight, quant_type)[0], packed)  # type: ignore[arg-type]


def test_a_parameter_and_inference_mode() -> None:
    """Gradient and inference mode are set per thread, and other threads do not inherit them."""
    weight = torch.nn.Parameter(torch.randn(3 * 2**20))
    expected = quantize_weight(weight.detach())[0]
    assert torch.equal(quantize_weight(weight)[0], expected)
    with torch.inference_mode():
        assert torch.equal(quantize_weight(weight.clone())[0], expected)


def test_there_are_as_many_threads_as_torch_has_each_with_one_core() -> None:
    together = threading.Barrier(THREADS, timeout=120)  # passed only by that many threads at the same time
    seen = []

    def piece(number: int) -> None:
        if number < THREADS:
            together.wait()
        seen.append((number, threading.current_thread(), torch.get_num_threads()))

    parallel_for_each(piece, range(10))
    assert sorted(number for number, _, _ in seen) == list(range(10))
    assert len({thread for _, thread, _ in seen}) == THREADS
    assert {threads for _, _, threads in seen} == {1}


def test_torchs_number_of_threads_is_restored() -> None:
    parallel_for_each(lambda _: None, range(10))
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), later) == (THREADS, [THREADS])


@pytest.mark.parametrize(("threads", "pieces"), [(1, 5), (THREADS, 1)])
def test_a_single_thread_is_the_callers(threads: int, pieces: int) -> None:
    torch.set_num_threads(threads)
    seen = []
    parallel_for_each(lambda _: seen.append(threading.current_thread()), range(pieces))
    assert set(seen) == {threading.current_thread()}
    assert torch.get_num_threads() == threads


def test_an_error_is_raised_in_the_caller_and_ends_the_work() -> None:
    done = []

    def piece(number: int) -> None:
        if number == 0:
            raise ValueError("piece 0")
        time.sleep(0.001)  # all items together would take seconds
        done.append(number)

    with pytest.raises(ValueError, match="piece 0"):
        parallel_for_each(piece, range(20_000))
    assert len(done) < 20_000 - 1
    assert torch.get_num_threads() == THREADS


def test_a_background_thread_starts_no_team() -> None:
    """With more OpenMP threads than cores, OpenMP stops spin-waiting in all threads."""
    large = torch.zeros(2**22)
    large.add_(1)  # starts this thread's team
    with background_executor("one") as pool:
        before = len(list(Path("/proc/self/task").iterdir()))
        assert pool.submit(lambda: (large.clone().add_(1).sum().item(), torch.get_num_threads())).result() == (2**23, 1)
        assert len(list(Path("/proc/self/task").iterdir())) == before
    assert torch.get_num_threads() == THREADS


def test_a_thread_that_starts_later_has_a_team() -> None:
    later: list[int] = []
    with background_executor("one"):
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    assert later == [THREADS]
