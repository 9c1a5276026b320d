"""DeepSpeed, imported once in the process that ranks are forked from."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.helpers.launchers import skip_unless


@pytest.fixture(scope="session", autouse=True)
def require_deepspeed() -> None:
    skip_unless(find_spec("deepspeed") is not None, "DeepSpeed")
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.stage3  # noqa: F401
