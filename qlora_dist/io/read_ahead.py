"""Read-ahead: a thread reads the next chunk of a file while the caller processes the current one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from qlora_dist.runtime.threads import background_executor

READ_CHUNK_BYTES = 2**25
"""Largest number of bytes in a read. It is a multiple of every element size, and for 16- and 32-bit weights of every
block size."""


@dataclass(frozen=True)
class ReadRequest:
    """Read that is planned."""

    nbytes: int
    read_into: Callable[[torch.Tensor], None]
    """Function that fills a uint8[nbytes] on the CPU. It runs in another thread and should release Python's lock."""


@dataclass(frozen=True)
class ReadProgress:
    """Progress of the reads."""

    read_bytes: int
    total_bytes: int
    wait_s: float
    """Seconds that the caller spent waiting for reads."""


class ReadAhead:
    """Iterator over the results of planned reads, in order.

    A thread reads one request ahead. There are two buffers of the largest read's size, which alternate, so a result is
    valid until the next one is requested. An exception of a read is raised when its result is requested.

    On a disk, the order should be that in the files. `progress` is called in the caller's thread with each result.
    """

    def __init__(self, reads: Sequence[ReadRequest], progress: Callable[[ReadProgress], None] | None = None) -> None:
        self.wait_s = 0.0
        self._read_bytes, self._total_bytes = 0, sum(read.nbytes for read in reads)
        self._progress = progress
        largest = max((read.nbytes for read in reads), default=0)
        self._free, self._in_use = (torch.empty(largest, dtype=torch.uint8) for _ in range(2))
        self._reads = iter(reads)
        self._thread = background_executor("read-ahead")
        self._next = self._begin()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        """Return uint8[nbytes], the result of the next read."""
        if self._next is None:
            raise StopIteration
        started = time.perf_counter()
        data, self._next = self._next, None
        out = data.result()
        self.wait_s += time.perf_counter() - started
        self._free, self._in_use = self._in_use, self._free
        self._next = self._begin()
        self._read_bytes += out.numel()
        if self._progress is not None:
            self._progress(ReadProgress(self._read_bytes, self._total_bytes, self.wait_s))
        return out

    def _begin(self) -> Future[torch.Tensor] | None:
        read = next(self._reads, None)
        return None if read is None else self._thread.submit(_run_request, read, self._free[: read.nbytes])

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)  # waits for a running read, which needs its file open


def _run_request(read: ReadRequest, out: torch.Tensor) -> torch.Tensor:
    read.read_into(out)
    return out


def read_chunks(nbytes: int, chunk_bytes: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield first byte and length of the chunks of `nbytes`; the default length is READ_CHUNK_BYTES."""
    chunk_bytes = chunk_bytes or READ_CHUNK_BYTES
    for start in range(0, nbytes, chunk_bytes):
        yield start, min(chunk_bytes, nbytes - start)
