"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

# one thread per process: the multi-rank tests share few cores, and sums keep their order
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from tests.helpers import tiny_models
from tests.helpers.launchers import skip_unless

# an example takes as long as the machine's other work lets it
settings.register_profile("ours", deadline=None)
settings.load_profile("ours")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 folder of a 3-layer Llama."""
    return tiny_models.make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_llama_nf4(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit folder of `tiny_llama`."""
    from qlora_dist.model.quantize_folder import quantize_folder
    from qlora_dist.model.quantize_plan import QuantizeOptions

    out = tmp_path_factory.mktemp("nf4") / "model"
    quantize_folder(tiny_llama, out, QuantizeOptions())
    return out


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, unpacked once for all of pytest's workers. Where tests decide about a merge its absence is
    a failure, not a skipped test.
    """
    from examples.quickstart import smollm2
    from qlora_dist.errors import UserError

    try:
        smollm2.find_gguf()
    except UserError as error:
        remedy = f"{error}; {smollm2.INSTALL_COMMAND}: SmolLM2"
        if os.environ.get("CI") == "true":
            pytest.fail(remedy)
        skip_unless(False, remedy)
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2" / "model"
    with FileLock(f"{folder.parent}.lock"):
        return smollm2.unpack_smollm2(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Jobs on a cluster begin first: they wait for its clocks for minutes, in which other workers compute."""
    items.sort(key=lambda item: "slurm" not in item.nodeid)
