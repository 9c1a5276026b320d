"""A limit to what a chat template may use of processor time and memory, for templates come with models of strangers."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import psutil

MAX_CPU_S = 30.0
"""Seconds of processor time to write one conversation; hundreds of turns take less than one."""
MAX_MEMORY_GROWTH_BYTES = 4 * 2**30
"""Bytes by which the process may grow while one text is rendered."""
_CHECK_INTERVAL_S = 0.05
"""Seconds of processor time between two looks at the clock and the memory."""
_T = TypeVar("_T")


class TemplateLimitError(Exception):
    """A template has used up what it may use."""


class TemplateLimiter:
    """Calls that end with TemplateLimitError as soon as they have used too much.

    Signals reach the main thread alone, so in other threads there is no limit. An operation of C is not interrupted.
    """

    def __init__(self) -> None:
        self._is_timer_set = self._is_rendering = False
        self._start_cpu_s, self._start_memory_bytes = 0.0, 0

    @contextmanager
    def enable_timer(self) -> Iterator[None]:
        """Set the timer once for many texts: a quarter of a short one's time, if each does it for itself."""
        if self._is_timer_set or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, _CHECK_INTERVAL_S, _CHECK_INTERVAL_S)
        self._is_timer_set = True
        try:
            yield
        finally:
            self._is_timer_set = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    def call(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call what writes one text.

        Raises:
            TemplateLimitError: it has used too much.
        """
        if not self._is_timer_set:
            with self.enable_timer():
                return self._call(function, *args, **kwargs)
        return self._call(function, *args, **kwargs)

    def _call(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        self._start_cpu_s, self._start_memory_bytes, self._is_rendering = time.process_time(), 0, True
        try:
            return function(*args, **kwargs)
        finally:
            self._is_rendering = False

    def _look(self, number: int, frame: FrameType | None) -> None:
        if not self._is_rendering:
            return
        if time.process_time() - self._start_cpu_s > MAX_CPU_S:
            raise TemplateLimitError(f"it takes more than {MAX_CPU_S:g} s of processor time")
        held_bytes = psutil.Process().memory_info().rss
        self._start_memory_bytes = self._start_memory_bytes or held_bytes
        if held_bytes - self._start_memory_bytes > MAX_MEMORY_GROWTH_BYTES:
            raise TemplateLimitError(f"it takes more than {MAX_MEMORY_GROWTH_BYTES / 2**30:g} GiB of memory")


TEMPLATE_LIMITER = TemplateLimiter()
