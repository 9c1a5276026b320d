"""If this fails, an impossible mesh ends in a hang instead of an error."""

from __future__ import annotations

import pytest

from qlora_dist.config.sections import ParallelConfig
from qlora_dist.errors import UserError
from qlora_dist.parallel.mesh import MeshSizes, mesh_sizes
from qlora_dist.runtime.environment import RankInfo


@pytest.mark.parametrize(
    ("base", "adapter", "expected"),
    [
        ("replicate", "world", (8, 1, 8)),
        ("node", "world", (8, 4, 8)),
        ("world", "world", (8, 8, 8)),
        ("paged", "world", (8, 4, 8)),
        (2, "node", (8, 2, 4)),
    ],
)
def test_mesh_sizes(base: str | int, adapter: str, expected: tuple[int, int, int]) -> None:
    config = ParallelConfig(base=base, adapter=adapter)  # type: ignore[arg-type]
    assert mesh_sizes(
        config, RankInfo(rank=0, world_size=8, local_rank=0, local_world_size=4, launcher="torchrun")
    ) == MeshSizes(*expected)


def test_a_base_that_does_not_divide_the_world_is_refused() -> None:
    with pytest.raises(UserError) as error:
        mesh_sizes(
            ParallelConfig(base=3),
            RankInfo(rank=0, world_size=8, local_rank=0, local_world_size=8, launcher="torchrun"),
        )
    assert str(error.value) == "parallel.base: 3 does not divide the world of 8 ranks; use 1, 2, 4 or 8"


def test_unequal_nodes_are_refused() -> None:
    with pytest.raises(UserError, match="start equal nodes"):
        mesh_sizes(
            ParallelConfig(base="node"),
            RankInfo(rank=0, world_size=7, local_rank=0, local_world_size=4, launcher="torchrun"),
        )
