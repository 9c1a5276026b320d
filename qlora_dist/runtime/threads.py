"""Threads beside torch's own: for pieces of work on all the cores of this process, and for work in the background.

In all of them torch's operators use one core. A thread would start a team of OpenMP's of its own otherwise; and once
OpenMP has more threads than there are cores, it lets none wait by spinning any more, so that the main thread wakes its
team for every operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")


def parallel_for_each(function: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Call `function` with every piece, in `torch.get_num_threads()` threads (`OMP_NUM_THREADS`: one of 1 is none).

    It gains only as far as `function` works without Python's lock, as torch and numpy do on large arrays.

    Raises:
        The error of the first piece that had one; pieces that were not begun are left.
    """
    threads = torch.get_num_threads()
    if min(threads, len(items)) <= 1:
        for piece in items:
            function(piece)
        return
    inference = torch.is_inference_mode_enabled()  # a matter of each thread: the caller's tensors need it in all

    def call_in_inference_mode(piece: Item) -> None:
        with torch.inference_mode(inference):
            function(piece)

    # The threads live as long as the call: a pool that is kept would be dead, and waited for, in a forked process.
    pool = ThreadPoolExecutor(min(threads, len(items)), initializer=_use_one_thread)
    try:
        for _ in pool.map(call_in_inference_mode, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the number that threads started later take, which the pool's have changed


def background_executor(name: str) -> ThreadPoolExecutor:
    """One thread, which is there at once."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, name)
    pool.submit(_use_one_thread).result()
    torch.set_num_threads(threads)  # as above: threads that start later take this number, and MKL has but one for all
    return pool


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # the first call in a thread, also within an operator, takes the number of the process
