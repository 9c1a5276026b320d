"""Reading what will be asked for next while the caller works on what it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

import torch

from qlora_dist.runtime.threads import background_executor

READ_CHUNK_BYTES = 2**25
"""The most that is read at a time. Of any type a whole number of elements, of 16 and 32 bit weights a whole number of
blocks of every size."""


@dataclass(frozen=True)
class ReadRequest:
    """A read to come."""

    nbytes: int
    into: Callable[[torch.Tensor], None]
    """Fills a uint8[nbytes] on the CPU. Called in another thread; it should work without Python's lock."""


@dataclass(frozen=True)
class ReadProgress:
    """How far the reads have come."""

    read_bytes: int
    total_bytes: int
    wait_s: float
    """Seconds in which the caller had nothing to do but wait for a read."""


class ReadAhead:
    """Iterates over the bytes of reads that are known beforehand, in their order.

    While the caller works on one, a thread reads the next, and no more than that: there are two buffers of the largest
    read's size, and they are used in turns. What a read gives is therefore valid until the next one is asked for.

    Args:
        reads: in the order in which they are asked for. On a disk it should be that of the files.
        progress: called, in the caller's thread, whenever a read is taken.

    Raises, where the read is asked for, whatever it raised.
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
        """uint8[nbytes] of the next read."""
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)  # waits for a read that has begun: its file stays open till then


def _run_request(read: ReadRequest, out: torch.Tensor) -> torch.Tensor:
    read.into(out)
    return out


def read_chunks(nbytes: int, chunk_bytes: int | None = None) -> Iterator[tuple[int, int]]:
    """First byte and length of the parts, of at most `chunk_bytes` or PIECE_BYTES, in which so many bytes are read."""
    chunk_bytes = chunk_bytes or READ_CHUNK_BYTES
    for start in range(0, nbytes, chunk_bytes):
        yield start, min(chunk_bytes, nbytes - start)
