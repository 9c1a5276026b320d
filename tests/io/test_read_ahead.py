"""If this fails, weights are mixed up, or loading hangs, uses too much memory, or hides a disk error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.errors import UserError
from qlora_dist.io import read_ahead
from qlora_dist.io.read_ahead import READ_CHUNK_BYTES, ReadAhead, ReadProgress, ReadRequest, read_chunks
from qlora_dist.io.safetensors_file import SafetensorsReader, SafetensorsWriter, read_safetensors_header
from qlora_dist.nf4.nf4_layout import BLOCK_SIZES

TIMEOUT_S = 20


def fill_with(value: int) -> Callable[[torch.Tensor], None]:
    def read_into(out: torch.Tensor) -> None:
        out.fill_(value)

    return read_into


def number(value: int, nbytes: int = 8) -> ReadRequest:
    return ReadRequest(nbytes, fill_with(value))


def values(out: torch.Tensor) -> list[int]:
    return out.tolist()


def test_reads_come_in_order_and_whole() -> None:
    with ReadAhead([number(value, nbytes) for value, nbytes in enumerate([3, 1, 0, 5, 2])]) as ahead:
        assert [values(out) for out in ahead] == [[0] * 3, [1], [], [3] * 5, [4] * 2]
    with ReadAhead([]) as ahead:
        assert list(ahead) == []


def test_only_the_next_read_runs_while_the_caller_works() -> None:
    begun = [threading.Event() for _ in range(4)]

    def begin(index: int) -> Callable[[torch.Tensor], None]:
        def into(out: torch.Tensor) -> None:
            out.fill_(index)
            begun[index].set()

        return into

    with ReadAhead([ReadRequest(4, begin(index)) for index in range(4)]) as ahead:
        for index in range(4):
            out = next(ahead)
            if index < 3:
                assert begun[index + 1].wait(TIMEOUT_S)
            time.sleep(0.02)
            assert [event.is_set() for event in begun] == [i <= index + 1 for i in range(4)]
            assert values(out) == [index] * 4, "the buffer was overwritten while it was in use"


def test_it_holds_two_buffers_of_the_largest_read() -> None:
    with ReadAhead([number(index, 1 + index % 7) for index in range(50)]) as ahead:
        places = {out.untyped_storage().data_ptr(): out.untyped_storage().nbytes() for out in ahead}
    assert list(places.values()) == [7, 7]


def test_an_error_is_raised_when_the_result_is_requested() -> None:
    def fail(out: torch.Tensor) -> None:
        raise UserError("the disk is broken")

    with ReadAhead([number(1), ReadRequest(8, fail), number(3)]) as ahead:
        assert values(next(ahead)) == [1] * 8
        with pytest.raises(UserError, match="the disk is broken"):
            next(ahead)
        with pytest.raises(StopIteration):
            next(ahead)


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer = SafetensorsWriter(path, [("x", torch.uint8, (100,))])
    writer.write("x", torch.ones(100, dtype=torch.uint8))
    writer.close()
    entry = read_safetensors_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-60])
    with SafetensorsReader() as reader:
        reads = [ReadRequest(50, lambda out, start=start: reader.read_into(out, entry, start)) for start in (0, 50)]
        with ReadAhead(reads) as ahead, pytest.raises(UserError, match="became shorter"):
            list(ahead)


def test_exit_waits_for_the_running_read_and_starts_no_other() -> None:
    events = []

    def slow(out: torch.Tensor) -> None:
        time.sleep(0.05)
        events.append("read")

    with ReadAhead([ReadRequest(1, slow)] * 5) as ahead:
        next(ahead)
    events.append("left")
    time.sleep(0.1)
    assert events in (["read", "read", "left"], ["read", "left"])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_only_idle_time_counts_as_waiting() -> None:
    finished = [threading.Event() for _ in range(2)]

    def slow(finish: threading.Event) -> Callable[[torch.Tensor], None]:
        def into(out: torch.Tensor) -> None:
            time.sleep(0.2)
            finish.set()

        return into

    with ReadAhead([ReadRequest(1, slow(finish)) for finish in finished]) as ahead:
        next(ahead)
        first = ahead.wait_s
        assert finished[1].wait(TIMEOUT_S)  # the caller's work takes longer than the read
        next(ahead)
    assert first > 0.15
    assert ahead.wait_s - first < 0.15


def test_progress_is_reported_in_the_callers_thread() -> None:
    reports: list[ReadProgress] = []

    def progress(reading: ReadProgress) -> None:
        assert threading.current_thread() is threading.main_thread()
        reports.append(reading)

    with ReadAhead([number(0, 10), number(0, 30)], progress) as ahead:
        assert not reports
        list(ahead)
    assert [(reading.read_bytes, reading.total_bytes) for reading in reports] == [(10, 40), (40, 40)]
    assert reports[1].wait_s >= reports[0].wait_s >= 0


@given(nbytes=st.integers(0, 5000), chunk_bytes=st.integers(1, 700))
def test_chunks_are_contiguous(nbytes: int, chunk_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_ahead, "READ_CHUNK_BYTES", chunk_bytes)
        parts = list(read_chunks(nbytes))
    assert [i for start, count in parts for i in range(start, start + count)] == list(range(nbytes))
    assert all(0 < count <= chunk_bytes for _, count in parts)


def test_a_chunk_holds_whole_blocks_of_every_size() -> None:
    for itemsize in (2, 4):
        assert all(READ_CHUNK_BYTES // itemsize % block_size == 0 for block_size in BLOCK_SIZES)
