"""DeepSpeed 0.19 behind functions of this package. Its optimizer is in `stage3.py`.

`deepspeed.initialize` needs a whole model on every rank and an optimizer. This file uses the layer below it: ZeRO-3's
parameters (`zero.Init`) and their gathering (`DeepSpeedZeRoOffload`). Modules gather their parameters before they run
and release them after. If a release of DeepSpeed moves any of this, tests/zero/test_deepspeed_internals.py or
tests/compat/test_private_names.py fails.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import nn

from qlora_dist.compat.transformers import mark_initialized
from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import set_local_rank
from qlora_dist.shard_view import FlatShard, set_flat_shard

DEEPSPEED_PRIVATE_NAMES = ("deepspeed.runtime.zero.partition_parameters.Init._convert_to_deepspeed_param",)


class ZeroPart(torch.Tensor):
    """Partition of a parameter, with the attributes that DeepSpeed reads on it.

    The class only names types: no instance is made, because DeepSpeed uses plain tensors.
    """

    ds_numel: int
    status: object
    """A member of DeepSpeed's `PartitionedParamStatus`."""
    final_location: object


class ZeroParameter(nn.Parameter):
    """Parameter with the attributes of ZeRO-3 that are used here.

    The class only names types: no instance is made, because DeepSpeed uses plain parameters.
    """

    ds_id: int
    ds_numel: int
    ds_numel_aligned: int
    ds_tensor: ZeroPart
    ds_secondary_tensor: torch.Tensor | None
    ds_process_group: dist.ProcessGroup
    ds_zero_partition_process_group: dist.ProcessGroup
    all_gather_coalesced: Callable[[Sequence[nn.Parameter]], _Handle]
    partition: Callable[[Sequence[nn.Parameter]], None]
    partition_numel: Callable[[], int]
    padding_size: Callable[[], int]


class _Handle(Protocol):
    """A collective in progress."""

    def wait(self) -> None: ...


class _Offload(Protocol):
    """The part of `DeepSpeedZeRoOffload` that is used after its construction."""

    def release_backward_leftovers(self) -> None:
        """Release what a backward pass has left gathered."""

    def partition_all_parameters(self) -> None: ...


OnAllGather = Callable[[dist.ProcessGroup, int], None]
"""Callback for each all-gather: its group, and the bytes that this rank receives."""


def check_deepspeed() -> None:
    """Check that DeepSpeed is installed, without importing it."""
    if find_spec("deepspeed") is None:
        raise UserError(
            "parallel.engine: zero3 needs DeepSpeed, which is not installed; pip install 'qlora-dist[zero]', with "
            "DS_BUILD_OPS=0 in the environment, or set parallel.engine=fsdp2"
        )


def check_async_io(device: torch.device) -> None:
    """Check that DeepSpeed can read and write files, and compile its operator for that if needed."""
    _import_deepspeed(device)
    from deepspeed.ops.op_builder import AsyncIOBuilder

    reason = "it finds no libaio or no C++ compiler"
    try:
        if AsyncIOBuilder().is_compatible(verbose=False):
            AsyncIOBuilder().load(verbose=False)
            return
    except (RuntimeError, OSError, AssertionError, ImportError, subprocess.CalledProcessError) as error:
        reason = str(error).strip().partition("\n")[0]
    raise UserError(
        f"optim.offload: nvme needs async_io of DeepSpeed, which is compiled at its first use ({reason}); install "
        "libaio with its headers, ninja and a C++ compiler, or set optim.name: paged-adamw-32bit and paging.to: disk, "
        "which need none of it"
    )


class Partitioner:
    """Converter of a model's parameters to ZeRO-3's, which also sets the hooks that gather them.

    DeepSpeed uses the default process group, which must exist.
    """

    def __init__(self, device: torch.device, on_gather: OnAllGather) -> None:
        _init_deepspeed(device, on_gather)
        from deepspeed.runtime.zero.partition_parameters import Init, free_param

        self._device, self._free = device, free_param
        # not entered as a context, because there it casts every new floating tensor
        self._init = Init(data_parallel_group=dist.group.WORLD, mem_efficient_linear=False)

    def partition(
        self,
        parameter: nn.Parameter,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        *,
        on_host: bool,
        is_first_replica: bool,
    ) -> nn.Parameter:
        """Return a partitioned parameter in place of one on meta, with memory for this rank's partition but no values.

        Args:
            parameter: the parameter, on meta.
            group: group of the ranks that share it.
            dtype: type that it is gathered in. Bytes and other integers keep their type.
            on_host: whether the partition is kept in host memory.
            is_first_replica: whether no lower rank holds the same partition.
        """
        dtype = dtype if parameter.is_floating_point() else parameter.dtype
        # the whole shape with the memory of one element, because DeepSpeed only reads the shape
        blank = torch.empty((), dtype=dtype, device=self._device).expand(parameter.shape)
        partitioned = zero_parameter(nn.Parameter(blank, requires_grad=parameter.requires_grad))
        partitioned.ds_zero_partition_process_group = group  # the default is the world
        mark_initialized(partitioned)
        self._init._convert_to_deepspeed_param(partitioned)
        numel, size = parameter.numel(), -(-parameter.numel() // group.size())
        device = torch.device("cpu") if on_host else self._device
        pinned = on_host and self._device.type == "cuda"
        padded = torch.empty(size, dtype=parameter.dtype, device=device, pin_memory=pinned)
        padded[max(0, numel - group.rank() * size) :] = 0
        part = padded if dtype == parameter.dtype else torch.zeros(size, dtype=dtype, device=device, pin_memory=pinned)
        shard = FlatShard(
            shape=parameter.shape, padded=padded, gathered=part, group=group, is_first_replica=is_first_replica
        )
        set_flat_shard(partitioned, shard)
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

        partitioned.ds_tensor = zero_part(part.view(-1))
        partitioned.ds_tensor.ds_numel = size
        partitioned.ds_tensor.status = PartitionedParamStatus.AVAILABLE
        partitioned.ds_tensor.final_location = None
        partitioned.ds_numel_aligned = size * group.size()
        self._free(partitioned)
        return partitioned

    def register_hooks(self, model: nn.Module, units: Sequence[nn.Module], settings: dict[str, Any]) -> GatherHooks:
        """Have the modules of a model gather their partitioned parameters, each unit all of its own at once.

        `settings` is `zero_optimization` of DeepSpeed's JSON.
        """
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.utils import set_z3_leaf_module

        for unit in units:
            set_z3_leaf_module(unit, True)
        zero = DeepSpeedZeroConfig(**settings)
        return GatherHooks(
            DeepSpeedZeRoOffload(
                model,
                timers=None,
                ds_config=None,
                overlap_comm=zero.overlap_comm,
                prefetch_bucket_size=zero.prefetch_bucket_size,
                max_reuse_distance=zero.max_reuse_distance,
                max_live_parameters=zero.max_live_parameters,
                param_persistence_threshold=zero.param_persistence_threshold,
                model_persistence_threshold=zero.model_persistence_threshold,
            )
        )


class GatherHooks:
    """Hooks of ZeRO-3 on a model."""

    def __init__(self, offload: _Offload) -> None:
        self._offload = offload

    def release_all(self) -> None:
        """Release what is still gathered, after backward or after a forward pass without one.

        DeepSpeed keeps parameters that it expects to need soon, which would be stale after an optimizer's step.
        """
        self._offload.release_backward_leftovers()
        self._offload.partition_all_parameters()

    @staticmethod
    def skip_backward_gather(module: nn.Module) -> None:
        """Skip gathering a module in backward, where its parameters are not needed."""
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            setattr(module, name, _IdentityFunction)  # torch's types allow only tensors and modules as attributes


class _IdentityFunction:
    """Replacement of the autograd functions that DeepSpeed puts around a module."""

    @staticmethod
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def zero_parameter(parameter: nn.Parameter) -> ZeroParameter:
    """Return the parameter itself, with the type of one that DeepSpeed has partitioned or is about to."""
    # The cast is sure because DeepSpeed sets the attributes on this object, or its caller does.
    return cast(ZeroParameter, parameter)


def zero_part(part: torch.Tensor) -> ZeroPart:
    """Return the tensor itself, with the type of a partition. Its attributes have no values yet."""
    # The cast is sure because a tensor takes any attribute, and the class adds nothing else.
    return cast(ZeroPart, part)


def gather_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Gather parameters outside of forward and backward. Call it on all ranks that share them."""
    first, *others = parameters
    zero_parameter(first).all_gather_coalesced([first, *others]).wait()


def release_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Release parameters from `gather_parameters`. Changes to them are lost."""
    first, *others = parameters
    zero_parameter(first).partition([first, *others])


def _init_deepspeed(device: torch.device, on_gather: OnAllGather) -> None:
    """Import DeepSpeed, and have it use this device and torch's default process group."""
    set_local_rank(device.index or 0)
    _import_deepspeed(device)
    import deepspeed
    from deepspeed import comm
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    set_accelerator(CUDA_Accelerator() if device.type == "cuda" else CPU_Accelerator())
    # On a CPU it would compile an operator for tensor parallelism at its start. Gathering needs none.
    deepspeed.ops.__compatible_ops__ = {}
    if not comm.is_initialized():
        comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)

    def all_gather(output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        on_gather(group, output_tensor.nbytes - input_tensor.nbytes)
        return dist.all_gather_single(output_tensor, input_tensor, group, async_op)

    comm.comm.cdb.all_gather_into_tensor = all_gather


def _import_deepspeed(device: torch.device) -> None:
    # else it searches for an accelerator, and warns if there is none
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed  # noqa: F401

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
