"""bitsandbytes, imported in three quarters of the time. Everybody here has it from this file.

It decorates six fallbacks with `torch.compile`, which loads torch's whole compiler: a quarter of what every rank
imports. Nothing of ours calls them (`nf4/quantize.py` says why); who does has them compiled at the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def _lazy_compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    compiled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(function, **options))
        return compiled[0](*args, **kwargs)

    return call


_torch_compile = torch.compile
torch.compile = _lazy_compile  # type: ignore[assignment]
try:
    import bitsandbytes.functional as functional
finally:
    torch.compile = _torch_compile

__all__ = ["functional"]
