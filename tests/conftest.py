"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# one thread per process: the multi-rank tests share few cores, and sums keep their order
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # tests import the helpers beside this file

import pytest
import tiny
import torch
from hypothesis import settings

# an example takes as long as the machine's other work lets it
settings.register_profile("ours", deadline=None)
settings.load_profile("ours")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 folder of a 3-layer Llama."""
    return tiny.make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_llama_nf4(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 4 bit."""
    from qlora_dist.model.quantize_folder import quantize_folder
    from qlora_dist.model.quantize_plan import QuantizeOptions

    out = tmp_path_factory.mktemp("nf4") / "model"
    quantize_folder(tiny_llama, out, QuantizeOptions())
    return out
