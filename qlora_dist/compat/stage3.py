"""The optimizer of ZeRO's stage 3 in DeepSpeed 0.19, without the half of it that gathers and reduces.

When a release of DeepSpeed moves any of this, tests/compat/test_private_names.py or
tests/zero/test_deepspeed_optimizer.py fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from qlora_dist.compat.deepspeed import ZeroParameter, zero_parameter, zero_part
from qlora_dist.shard_view import FlatShard

STAGE3_PRIVATE_NAMES = (
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._get_norm_groups",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._optimizer_states_and_gradient_swap_in",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._optimizer_states_and_gradient_swap_out",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._swappable_optimizer_subgroup",
)


class Stage3Optimizer(Protocol):
    """The part of `DeepSpeedZeroOptimizer_Stage3` that is used here."""

    offload_optimizer: bool
    optimizer: torch.optim.Optimizer
    fp32_partitioned_groups_flat: list[torch.Tensor]
    """Values of each sub-group: fp32[n]."""
    fp16_partitioned_groups_flat_numel: list[int]
    """Elements of each sub-group."""
    grad_position: dict[int, list[int]]
    """Sub-group, first element in it and number of elements of each partition, by its `ds_id`."""

    def partition_grads(self, params: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor]) -> None:
        """Take the gradient of each partition."""

    def independent_gradient_partition_epilogue(self) -> None:
        """End the reduction of gradients."""

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the next gradients are the last ones before a step."""

    def step(self) -> None: ...

    def _swappable_optimizer_subgroup(self, index: int) -> bool: ...

    def _optimizer_states_and_gradient_swap_in(self, index: int) -> None: ...

    def _optimizer_states_and_gradient_swap_out(self, index: int) -> None: ...


def swap_subgroup_in(optimizer: Stage3Optimizer, index: int) -> None:
    """Read a sub-group's states into memory, if their place is a file."""
    if optimizer._swappable_optimizer_subgroup(index):
        optimizer._optimizer_states_and_gradient_swap_in(index)


def swap_subgroup_out(optimizer: Stage3Optimizer, index: int) -> None:
    """Write a sub-group's states to their file, if their place is a file."""
    if optimizer._swappable_optimizer_subgroup(index):
        optimizer._optimizer_states_and_gradient_swap_out(index)


def make_stage3_partition(shard: FlatShard, ds_id: int) -> ZeroParameter:
    """Return a shard as a parameter of stage 3, in fp32 because the engine does the rounding."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    partition = zero_parameter(nn.Parameter(shard.padded))
    partition.ds_tensor = zero_part(shard.padded.view(-1))
    partition.ds_tensor.ds_numel = size = shard.padded.numel()
    partition.ds_tensor.status = PartitionedParamStatus.AVAILABLE
    partition.ds_id, partition.ds_process_group, partition.ds_numel = ds_id, shard.group, shard.shape.numel()
    partition.partition_numel = lambda: size
    partition.padding_size = lambda: size * shard.num_shards - shard.shape.numel()
    partition.ds_secondary_tensor = None
    return partition


def make_stage3_optimizer(
    optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], device: torch.device, folder: Path | None
) -> Stage3Optimizer:
    """Return DeepSpeed's optimizer around torch's fused AdamW over partitions from `make_stage3_partition`.

    `settings` is `zero_optimization` of DeepSpeed's JSON. `folder` is the place of files, if these offload to NVMe.
    """
    from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.utils.timer import NoopTimer

    class Stage3(DeepSpeedZeroOptimizer_Stage3):
        def initialize_ds_offload(self, *_: Any, **__: Any) -> Any:
            """Set no hooks, because the model has them already and they release everything before a step."""
            coordinator = SimpleNamespace()
            return SimpleNamespace(
                dp_process_group=dist.group.WORLD,
                persistent_parameters=[],
                get_param_coordinator=lambda: coordinator,
                partition_all_parameters=lambda: None,
            )

        def create_reduce_and_remove_grad_hooks(self) -> None:
            """Set no hooks, because sums come from `GradientReducer`."""

        def _create_fp32_partitions(self) -> None:
            # DeepSpeed compares a device with a name, and would hold a second copy of the values.
            if not self.offload_optimizer:
                self.device = device
            super()._create_fp32_partitions()

        def _get_norm_groups(self) -> list[torch.Tensor]:
            # The gradients are finite and clipped already, so that no norm has to be exchanged.
            return [torch.zeros(())]

    zero = DeepSpeedZeroConfig(stage=3, **settings)
    offload = zero.offload_optimizer
    if offload is not None:
        offload.nvme_path = folder
    stage3: Stage3Optimizer = Stage3(
        nn.Module(),
        optimizer,
        param_names={},
        timers=NoopTimer(),
        ds_config=None,
        contiguous_gradients=False,
        communication_data_type=torch.float32,
        offload_optimizer_config=offload,
        sub_group_size=zero.sub_group_size,
        offload_ratio=1.0,
        aio_config=get_aio_config({}),
    )
    stage3.set_gradient_accumulation_boundary(True)
    return stage3
