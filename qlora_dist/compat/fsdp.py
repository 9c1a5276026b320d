"""Private parts of FSDP2 in torch 2.13, behind functions of this package.

`shard_placement_fn` may return a mesh per parameter, but the type that it returns is private. A unit whose parameters
lie on several meshes refuses the public setters of its communication. If a release of torch moves any of this,
tests/compat/test_fsdp.py or tests/compat/test_private_names.py fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from torch.distributed.tensor import Shard

from qlora_dist.runtime.byte_sizes import align_bytes

try:
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
    from torch.distributed.fsdp._fully_shard._fsdp_common import (
        FSDPMeshInfo,
        HSDPMeshInfo,
        ShardPlacementResult,
        TrainingState,
    )
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
except ImportError as error:  # pragma: no cover (another torch)
    raise ImportError(
        f"torch {torch.__version__} has moved parts of FSDP2 that qlora-dist uses ({error}); install torch 2.13"
    ) from error

FSDP_PRIVATE_NAMES = (
    "torch.distributed.fsdp.FSDPModule._get_fsdp_state",
    "torch.distributed.fsdp._fully_shard._fsdp_collectives.DefaultAllGather",
    "torch.distributed.fsdp._fully_shard._fsdp_collectives.DefaultReduceScatter",
    "torch.distributed.fsdp._fully_shard._fsdp_common.FSDPMeshInfo",
    "torch.distributed.fsdp._fully_shard._fsdp_common.HSDPMeshInfo",
    "torch.distributed.fsdp._fully_shard._fsdp_common.ShardPlacementResult",
    "torch.distributed.fsdp._fully_shard._fsdp_common.TrainingState",
    "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam",
    "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam._sharded_param_data",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup._all_gather_comm",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup._all_gather_result",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup._all_reduce_hook",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup._reduce_scatter_comm",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup._training_state",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup._validate_no_meta_params",
    "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._fsdp_param_groups",
)

OnCollective = Callable[[str, str, int], None]
"""Callback for each collective: its name, the mesh dimension, and the bytes that this rank receives."""

PassDirection = Literal["forward", "backward"]
AcquirePage = Callable[[PassDirection], torch.Tensor]
"""Function that returns a unit's page on its device, uint8[n], for the pass that needs it."""
ReleasePage = Callable[[torch.Event | None], None]
"""Callback after the page has been read. With an event of another stream, the page is in use until the event."""


class MeshPlacement:
    """Placement of a parameter on another mesh than the one given to `fully_shard`.

    FSDP2 groups parameters by the identity of the mesh's description, so all parameters of a mesh share one.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        if mesh.ndim == 1:
            self._info = FSDPMeshInfo(mesh, shard_mesh_dim=0)
        else:
            self._info = HSDPMeshInfo(mesh, replicate_mesh_dim=0, shard_mesh_dim=1)

    def __call__(self, placement: Shard) -> ShardPlacementResult:
        """Cut a parameter along `placement.dim` over this mesh."""
        return ShardPlacementResult(placement, self._info)


def observe_collectives(unit: FSDPModule, on_collective: OnCollective) -> None:
    """Call a function for every collective that a unit issues."""
    for group in _groups(unit):
        dim = _shard_dim_name(group)
        group._all_gather_comm = _ObservedAllGather(dim, on_collective)
        group._reduce_scatter_comm = _ObservedReduceScatter(dim, on_collective)
        if isinstance(group.mesh_info, HSDPMeshInfo):
            replicas = group.mesh_info.replicate_mesh_size

            def report(reduced: torch.Tensor, replicas: int = replicas) -> None:
                # a ring all-reduce is a reduce-scatter and an all-gather
                on_collective("all_reduce", "replica", 2 * reduced.nbytes * (replicas - 1) // replicas)

            group._all_reduce_hook = report


def offload_frozen_only(unit: FSDPModule) -> None:
    """Restrict a unit's offload policy to its frozen parameters."""
    for group in _groups(unit):
        if any(p.sharded_param.requires_grad for p in group.fsdp_params):
            group.offload_policy = OffloadPolicy()
            for parameter in group.fsdp_params:
                parameter.offload_to_cpu = parameter.pin_memory = False


def frozen_shards(unit: FSDPModule) -> list[tuple[nn.Parameter, int, int]]:
    """Return a unit's frozen parameters in the order of a page.

    Each has the first byte of this rank's shard, and its number of bytes with FSDP2's padding.
    """
    shards, start = [], 0
    for group in _groups(unit):
        for parameter in group.fsdp_params:
            if not parameter.sharded_param.requires_grad:
                nbytes = parameter._sharded_param_data.nbytes
                shards.append((parameter.sharded_param, start, nbytes))
                start += align_bytes(nbytes)
    return shards


def page_frozen_parameters(unit: FSDPModule, acquire_page: AcquirePage, release_page: ReleasePage) -> None:
    """Have a unit read its frozen shards from a page whenever it gathers them. The parameters stay on meta.

    The page is acquired when FSDP2 reads the shards, and released right after. With several ranks that is in `unshard`,
    which copies them into the all-gather's buffer. On one rank it is in `wait_for_unshard`. So one page is in use at a
    time, whatever FSDP2 prefetches. It is laid out as `frozen_shards` returns.
    """
    starts = {id(parameter): (start, nbytes) for parameter, start, nbytes in frozen_shards(unit)}
    for group in _groups(unit):
        frozen = [(p, *starts[id(p.sharded_param)]) for p in group.fsdp_params if id(p.sharded_param) in starts]
        if frozen:
            _page_group(group, frozen, acquire_page, release_page)


def _page_group(
    group: FSDPParamGroup,
    frozen: list[tuple[FSDPParam, int, int]],
    acquire_page: AcquirePage,
    release_page: ReleasePage,
) -> None:
    unshard, wait_for_unshard = group.unshard, group.wait_for_unshard
    assert isinstance(group.mesh_info, FSDPMeshInfo)
    is_single_rank = group.mesh_info.shard_mesh_size == 1
    on_meta = [parameter._sharded_param_data for parameter, _, _ in frozen]

    def with_page(read: Callable[[], None], used_on: Callable[[], torch.Event | None]) -> None:
        page = acquire_page("backward" if group._training_state == TrainingState.PRE_BACKWARD else "forward")
        for (parameter, start, nbytes), meta_shard in zip(frozen, on_meta, strict=True):
            parameter._sharded_param_data = page[start : start + nbytes].view(meta_shard.dtype)
        read()
        release_page(used_on())
        for (parameter, _, _), meta_shard in zip(frozen, on_meta, strict=True):
            parameter._sharded_param_data = meta_shard

    def paged_unshard(async_op: bool = False) -> None:
        def copied_in() -> torch.Event:
            stream, _ = group.comm_ctx.get_all_gather_streams(async_op, group._training_state)
            return stream.record_event()

        reads = not is_single_rank and group._all_gather_result is None and not group.is_unsharded
        if reads:
            with_page(lambda: unshard(async_op), copied_in)
        else:
            unshard(async_op)

    def paged_wait_for_unshard() -> None:
        if is_single_rank and group._all_gather_result is not None:
            with_page(wait_for_unshard, lambda: None)
        else:
            wait_for_unshard()

    # FSDP2 has no hook at these places, so the methods of this one group are replaced
    group.unshard = paged_unshard  # type: ignore[method-assign]
    group.wait_for_unshard = paged_wait_for_unshard  # type: ignore[method-assign]
    group._validate_no_meta_params = lambda: None  # type: ignore[method-assign]  # it requires memory for frozen parameters


def _groups(unit: FSDPModule) -> Iterator[FSDPParamGroup]:
    yield from unit._get_fsdp_state()._fsdp_param_groups


def _shard_dim_name(group: FSDPParamGroup) -> str:
    info = group.mesh_info
    assert isinstance(info, FSDPMeshInfo) and info.shard_mesh_dim is not None
    assert info.mesh.mesh_dim_names is not None
    return info.mesh.mesh_dim_names[info.shard_mesh_dim]


class _ObservedAllGather(DefaultAllGather):
    def __init__(self, dim: str, on_collective: OnCollective) -> None:
        super().__init__()
        self._dim, self._on_collective = dim, on_collective

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self._on_collective("all_gather", self._dim, output_tensor.nbytes - input_tensor.nbytes)
        return super().__call__(output_tensor, input_tensor, group, async_op)


class _ObservedReduceScatter(DefaultReduceScatter):
    def __init__(self, dim: str, on_collective: OnCollective) -> None:
        super().__init__()
        self._dim, self._on_collective = dim, on_collective

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work:
        self._on_collective("reduce_scatter", self._dim, input_tensor.nbytes - output_tensor.nbytes)
        return super().__call__(output_tensor, input_tensor, group, op, async_op)
