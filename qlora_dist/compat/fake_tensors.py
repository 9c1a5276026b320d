"""Fake tensors and the fake process group of torch 2.13, with which `trace` runs a training step without memory."""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore as FakeStore

FAKE_TENSORS_PRIVATE_NAMES = (
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.testing._internal.distributed.fake_pg.FakeStore",
)
