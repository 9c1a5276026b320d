"""If this fails, a release of DeepSpeed has changed what `compat/deepspeed.py` uses. Change that file."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qlora_dist.compat.deepspeed import Partitioner, gather_parameters, release_parameters
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.shard_view import full_shape, full_tensor, get_flat_shard, local_slice
from tests.helpers.measured_step import gathered_bytes
from tests.helpers.ranks import run_ranks

SHAPES = {"0.weight": (5, 7), "0.bias": (5,), "1.weight": (3, 5), "1.bias": (3,)}


def use_internals() -> list[int]:
    ranks, seen = read_rank_info(), []
    os.environ |= {"CXX": "/bin/false", "CC": "/bin/false", "PATH": ""}  # no compiler is needed
    plain = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    with torch.no_grad():
        for index, parameter in enumerate(plain.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 100 + index)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    model.requires_grad_(False)
    with process_group(ranks, torch.device("cpu")):
        partitioner = Partitioner(torch.device("cpu"), lambda group, nbytes: seen.append(nbytes))
        for module in model:
            for name, parameter in module.named_parameters():
                module._parameters[name] = partitioner.partition(
                    parameter, dist.group.WORLD, torch.float32, on_host=False, is_first_replica=True
                )
        for name, parameter in model.named_parameters():
            assert full_shape(parameter) == SHAPES[name] and parameter.numel() == 0
            get_flat_shard(parameter).local.copy_(local_slice(parameter, plain.get_parameter(name).detach()))
            assert torch.equal(full_tensor(parameter), plain.get_parameter(name))
        settings = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
        settings |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
        gathering = partitioner.register_hooks(model, [model[0]], settings)
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
        for _ in range(3):  # DeepSpeed records the order of modules, and uses it from the third pass on
            torch.testing.assert_close(model(x), plain(x))
            assert gathered_bytes(model.parameters()) == 0
        gather_parameters(model.parameters())
        assert gathered_bytes(model.parameters()) >= 4 * (35 + 5 + 15 + 3)
        release_parameters(model.parameters())
        gathering.release_all()
        assert gathered_bytes(model.parameters()) == 0
    return seen


@pytest.mark.parametrize("ranks", [1, 3])
def test_parameters_are_gathered_and_released(ranks: int) -> None:
    for seen in run_ranks(ranks, use_internals):
        # a module's parameters of one dtype are gathered in one collective, padded to equal parts; one rank needs none
        assert seen[:2] == ([] if ranks == 1 else [8 * (12 + 2), 8 * (5 + 1)])
