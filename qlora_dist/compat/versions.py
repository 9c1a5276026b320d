"""Check of library versions, before anything heavy is imported."""

from __future__ import annotations

import re
from importlib import metadata

from qlora_dist.errors import UserError

_MIN_VERSIONS = {
    # older FSDP2 casts every parameter to the compute type, bytes included, and has no mesh per parameter
    "torch": (2, 13),
    "transformers": (5, 0),
    "peft": (0, 21),
    "bitsandbytes": (0, 50),
}

TESTED_VERSIONS = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "datasets": "5.2.0",
}
"""Versions that the tests were run with. constraints.txt has all of them."""


def check_versions() -> None:
    """Compare the installed versions with the oldest that work."""
    for package, oldest in _MIN_VERSIONS.items():
        required = ".".join(map(str, oldest))
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise UserError(f"{package} is not installed; pip install '{package}>={required}'") from None
        if _parse_release(installed) < oldest:
            raise UserError(
                f"{package} {installed} is too old, {required} is needed; pip install '{package}>={required}'"
            )


def _parse_release(version: str) -> tuple[int, ...]:
    """Return (2, 13) for 2.13.0+cpu. A pre-release counts as its release."""
    return tuple(int(re.sub(r"\D.*", "", part) or 0) for part in version.partition("+")[0].split(".")[:2])
