"""Waiting for a condition in tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def wait_for(condition: Callable[[], _T], within_s: float) -> _T:
    """Wait until a condition is true, and return its value. Fail after `within_s` seconds."""
    end = time.monotonic() + within_s
    while not (result := condition()):
        assert time.monotonic() < end, f"waited for more than {within_s:.0f} s"
        time.sleep(0.1)
    return result
