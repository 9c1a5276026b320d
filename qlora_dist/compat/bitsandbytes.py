"""bitsandbytes 0.50, imported without torch's compiler. The package imports bitsandbytes from this file only.

bitsandbytes decorates six fallbacks with `torch.compile`, which loads torch's whole compiler: a quarter of the import
time of every rank. This package calls none of them, for the reason in `nf4/quantize.py`. Here they are compiled at
their first call.
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
    from bitsandbytes import functional as functional
finally:
    torch.compile = _torch_compile
