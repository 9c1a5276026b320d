"""Limits on the processor time and memory of a chat template, because templates come with untrusted models."""

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
"""Seconds of processor time to render one conversation. Hundreds of turns take less than one."""
MAX_MEMORY_GROWTH_BYTES = 4 * 2**30
"""Bytes by which the process may grow while one text is rendered."""
_CHECK_INTERVAL_S = 0.05
"""Seconds of processor time between two checks."""
_Result = TypeVar("_Result")


class TemplateLimitError(Exception):
    """Template exceeded a limit."""


class TemplateLimiter:
    """Limiter of calls, which raises `TemplateLimitError` as soon as a call exceeds a limit.

    Signals reach only the main thread, so calls in other threads have no limit. C code is not interrupted.
    """

    def __init__(self) -> None:
        self._is_timer_set = self._is_rendering = False
        self._start_cpu_s, self._start_memory_bytes = 0.0, 0

    @contextmanager
    def enable_timer(self) -> Iterator[None]:
        """Enable the timer once for many texts. Enabling it for each would cost a quarter of a short text's time."""
        if self._is_timer_set or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGPROF, self._check_usage)
        signal.setitimer(signal.ITIMER_PROF, _CHECK_INTERVAL_S, _CHECK_INTERVAL_S)
        self._is_timer_set = True
        try:
            yield
        finally:
            self._is_timer_set = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    def call(self, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        if not self._is_timer_set:
            with self.enable_timer():
                return self._call(function, *args, **kwargs)
        return self._call(function, *args, **kwargs)

    def _call(self, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        self._start_cpu_s, self._start_memory_bytes, self._is_rendering = time.process_time(), 0, True
        try:
            return function(*args, **kwargs)
        finally:
            self._is_rendering = False

    def _check_usage(self, number: int, frame: FrameType | None) -> None:
        if not self._is_rendering:
            return
        if time.process_time() - self._start_cpu_s > MAX_CPU_S:
            raise TemplateLimitError(f"it takes more than {MAX_CPU_S:g} s of processor time")
        held_bytes = psutil.Process().memory_info().rss
        self._start_memory_bytes = self._start_memory_bytes or held_bytes
        if held_bytes - self._start_memory_bytes > MAX_MEMORY_GROWTH_BYTES:
            raise TemplateLimitError(f"it takes more than {MAX_MEMORY_GROWTH_BYTES / 2**30:g} GiB of memory")


TEMPLATE_LIMITER = TemplateLimiter()
