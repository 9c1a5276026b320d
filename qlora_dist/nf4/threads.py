"""Independent pieces of work on all the cores that this process may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")


def for_each(function: Callable[[Piece], None], pieces: Sequence[Piece]) -> None:
    """Call `function` with every piece, in `torch.get_num_threads()` threads (`OMP_NUM_THREADS`: one of 1 is none).

    It gains only as far as `function` works without Python's lock, as torch and numpy do on large arrays. In these
    threads torch's own operators use one core each: every thread would start a team of its own otherwise, cores times
    cores in all.

    Raises:
        The error of the first piece that had one; pieces that were not begun are left.
    """
    threads = torch.get_num_threads()
    if min(threads, len(pieces)) <= 1:
        for piece in pieces:
            function(piece)
        return
    inference = torch.is_inference_mode_enabled()  # a matter of each thread: the caller's tensors need it in all

    def in_callers_mode(piece: Piece) -> None:
        with torch.inference_mode(inference):
            function(piece)

    # The threads live as long as the call: a pool that is kept would be dead, and waited for, in a forked process.
    pool = ThreadPoolExecutor(min(threads, len(pieces)), initializer=torch.set_num_threads, initargs=(1,))
    try:
        for _ in pool.map(in_callers_mode, pieces):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the number that threads started later take, which the pool's have changed
