"""Threads that use all cores of this process, and threads for background work.

In these threads torch's operators use one core. Otherwise each thread would start its own OpenMP team. When OpenMP has
more threads than there are cores, it stops spin-waiting, and the main thread must wake its team for every operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")


def parallel_for_each(function: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Call `function` with every item, in `torch.get_num_threads()` threads (OMP_NUM_THREADS).

    It is faster only where `function` releases Python's lock, as torch and numpy do on large arrays.

    Raises:
        Exception: the error of the first item that failed. Items that were not begun are skipped.
    """
    threads = torch.get_num_threads()
    if min(threads, len(items)) <= 1:
        for item in items:
            function(item)
        return
    inference = torch.is_inference_mode_enabled()  # inference mode is per thread, and the caller's tensors need it

    def call_in_inference_mode(item: Item) -> None:
        with torch.inference_mode(inference):
            function(item)

    # The pool lives as long as the call, because a forked process would wait for the dead threads of a kept pool.
    pool = ThreadPoolExecutor(min(threads, len(items)), initializer=_use_one_thread)
    try:
        for _ in pool.map(call_in_inference_mode, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the pool's threads have changed the number that later threads take


def background_executor(name: str) -> ThreadPoolExecutor:
    """Return an executor with one thread, which has started already."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, name)
    pool.submit(_use_one_thread).result()
    torch.set_num_threads(threads)  # later threads take this number, and MKL has one number for all threads
    return pool


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # the first call in a thread, also within an operator, copies the process's number
