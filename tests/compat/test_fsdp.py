"""If this fails, torch has changed a part of FSDP2 that `compat/fsdp.py` uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from qlora_dist.compat.fsdp import (
    MeshPlacement,
    PassDirection,
    _groups,
    _shard_dim_name,
    frozen_shards,
    observe_collectives,
    offload_frozen_only,
    page_frozen_parameters,
)
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from tests.helpers.ranks import run_ranks


def two_meshes_in_one_unit() -> None:
    with process_group(read_rank_info(), torch.device("cpu")):
        world = init_device_mesh("cpu", (2,), mesh_dim_names=("world",))
        alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replica", "shard"))["shard"]
        place = MeshPlacement(world)
        torch.manual_seed(0)
        unit = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 2, bias=False))
        unit[0].requires_grad_(False)
        whole = unit[1].weight.detach().clone()
        fully_shard(
            unit,
            mesh=alone,
            shard_placement_fn=lambda p: place(Shard(1)) if p.requires_grad else None,
            offload_policy=CPUOffloadPolicy(pin_memory=False),
        )
        offload_frozen_only(unit)
        seen: list[tuple[str, str, int]] = []
        observe_collectives(unit, lambda *event: seen.append(event))

        groups = {
            _shard_dim_name(g): [tuple(p.sharded_param.to_local().shape) for p in g.fsdp_params] for g in _groups(unit)
        }
        assert groups == {"shard": [(4, 6)], "world": [(2, 2)]}
        policies = {type(g.offload_policy) for g in _groups(unit) if g.fsdp_params[0].sharded_param.requires_grad}
        assert policies == {OffloadPolicy}

        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        x = torch.ones(3, 6)
        unit(x).sum().backward()
        # half of an fp32[2, 4] each (the root stays gathered for backward), and nothing on the mesh of one
        assert sorted(seen) == [("all_gather", "world", 16), ("reduce_scatter", "world", 16)]
        gradient = unit[1].weight.grad.full_tensor()
        expected = 2 * (x @ unit[0].weight.full_tensor().T).sum(0).expand(2, 4)  # summed over ranks, not averaged
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(unit[1].weight.full_tensor(), whole)


def paged_units() -> None:
    """Compare two layers, each with a frozen matrix in a page and a trained one, with plain tensors."""
    with process_group(read_rank_info(), torch.device("cpu")):
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("world",))
        torch.manual_seed(0)
        frozen, trained = ([torch.randn(5, 5, requires_grad=learns) for _ in range(2)] for learns in (False, True))
        with torch.device("meta"):
            layers = [nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)) for _ in range(2)]
        model = nn.Sequential(*layers)
        events: list[tuple[str, int, str]] = []
        for index, layer in enumerate(layers):
            layer[0].requires_grad_(False)
            fully_shard(layer, mesh=mesh)
            ((parameter, start, nbytes),) = frozen_shards(layer)
            assert (start, nbytes) == (0, -(-5 // ranks) * 5 * 4) and parameter.device.type == "meta"
            whole = torch.nn.functional.pad(frozen[index], (0, 0, 0, 1))  # to the size of both ranks' shards
            page = whole[rank * nbytes // 20 :][: nbytes // 20].reshape(-1).view(torch.uint8)

            def get_page(which: PassDirection, index: int = index, page: torch.Tensor = page) -> torch.Tensor:
                events.append(("used", index, which))
                return page

            def page_done(used: torch.Event | None, index: int = index) -> None:
                events.append(("done", *events[-1][1:]))

            page_frozen_parameters(layer, get_page, page_done)
        fully_shard(model, mesh=mesh)
        for index, layer in enumerate(layers):
            empty = torch.empty(layer[1].weight.to_local().shape)
            layer[1].weight = nn.Parameter(
                DTensor.from_local(empty, mesh, [Shard(0)], shape=torch.Size([5, 5]), stride=(5, 1))
            )
            empty.copy_(trained[index].detach()[rank * -(-5 // ranks) :][: len(empty)])
        layers[0].set_modules_to_forward_prefetch([layers[1]])
        layers[1].set_modules_to_backward_prefetch([layers[0]])
        x = torch.randn(3, 5)
        for _ in range(2):
            model(x).sum().backward()
        expected, order = x, [(0, "forward"), (1, "forward"), (1, "backward"), (0, "backward")]
        for w, v in zip(frozen, trained, strict=True):
            expected = expected @ w.T @ v.T
        expected.sum().backward()
        for layer, v in zip(layers, trained, strict=True):
            torch.testing.assert_close(layer[1].weight.grad.full_tensor(), 2 * v.grad)
            assert layer[0].weight.device.type == "meta"
        # one page at a time in spite of prefetching, and each once per pass
        assert events == 2 * [(event, *use) for use in order for event in ("used", "done")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_unit_takes_its_frozen_shards_from_a_page(ranks: int) -> None:
    run_ranks(ranks, paged_units)


def test_parameters_of_one_unit_lie_on_two_meshes() -> None:
    run_ranks(2, two_meshes_in_one_unit)


def test_nothing_else_imports_private_parts_of_fsdp() -> None:
    package = Path(__file__).parents[2] / "qlora_dist"
    users = {p.name for p in package.rglob("*.py") if "fsdp._fully_shard" in p.read_text()}
    assert users == {"fsdp.py"}
