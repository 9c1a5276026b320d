"""If this fails, two ranks compute on one GPU, or a rank uses a GPU that it was not given."""

from __future__ import annotations

import pytest
import torch

from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import Launcher, RankInfo
from qlora_dist.runtime.process_group import resolve_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Pretend that torch sees a number of GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("gpus", "launcher", "index"),
    [
        (4, "torchrun", 3),
        (8, "srun", 3),
        (1, "srun", 0),  # --gpus-per-task=1: each rank sees its own, as number 0
        (1, "mpi", 0),
    ],
    indirect=["gpus"],
)
def test_each_rank_has_its_gpu(gpus: int, launcher: Launcher, index: int) -> None:
    assert resolve_device(
        "auto", RankInfo(rank=7, world_size=8, local_rank=3, local_world_size=4, launcher=launcher)
    ) == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("gpus", "launcher"), [(2, "srun"), (3, "mpi"), (2, "torchrun"), (1, "torchrun")], indirect=["gpus"]
)
@pytest.mark.parametrize("local_rank", [0, 3])
def test_more_ranks_than_gpus_are_refused_by_all_of_them(gpus: int, launcher: Launcher, local_rank: int) -> None:
    with pytest.raises(UserError, match=f"^4 ranks were started on a node with {gpus} GPUs; start {gpus}$"):
        resolve_device(
            "auto",
            RankInfo(rank=local_rank, world_size=4, local_rank=local_rank, local_world_size=4, launcher=launcher),
        )
    assert resolve_device(
        "cpu", RankInfo(rank=local_rank, world_size=4, local_rank=local_rank, local_world_size=4, launcher=launcher)
    ) == torch.device("cpu")
