"""DeepSpeed's ZeRO-3 optimizer over this rank's flat shards, with DeepSpeed's offload and files.

`DeepSpeedZeroOptimizer_Stage3` sums gradients after every micro-batch, in hooks on the layers. The hook of the first
layer, whose input needs no gradient, runs before there is a gradient. So only the part behind the hooks is used
here: it gets gradients summed over all ranks, and holds, moves and updates the states. `compat/stage3.py` has what is
private to DeepSpeed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from qlora_dist.adapters.attach import is_lora_b_parameter, named_trainable_parameters
from qlora_dist.compat.deepspeed import ZeroParameter, zero_parameter
from qlora_dist.compat.stage3 import (
    Stage3Optimizer,
    make_stage3_optimizer,
    make_stage3_partition,
    swap_subgroup_in,
    swap_subgroup_out,
)
from qlora_dist.config.sections import OptimConfig, PagingConfig
from qlora_dist.errors import UserError
from qlora_dist.optim.adamw import PagedAdamW
from qlora_dist.optim.optimizer_state import STATE_NAMES
from qlora_dist.parallel.ds_config import zero_optimizer_settings
from qlora_dist.shard_view import FlatShard, get_flat_shard


class ZeroOptimizerState:
    """The optimizer states of a rank's shards and, with offload, fp32 copies of their values, held by DeepSpeed.

    The shards of the model, which `parallelize_zero3` made, are moved into one tensor. The section `paging` sets the
    bytes that are moved at a time, and the folder of the files.
    """

    bits = 32

    def __init__(self, model: nn.Module, config: OptimConfig, paging: PagingConfig, device: torch.device) -> None:
        self._folder = _make_swap_folder(paging) if config.offload == "nvme" else None
        named = [(name, get_flat_shard(parameter), parameter) for name, parameter in named_trainable_parameters(model)]
        self._shards = [shard for _, shard, _ in named if shard is not None]
        self._partitions = [
            make_stage3_partition(shard, zero_parameter(p).ds_id) for _, shard, p in named if shard is not None
        ]
        factors = [config.lora_plus_ratio if is_lora_b_parameter(name) else 1.0 for name, _, _ in named]
        self._zero = _make_optimizer(self._partitions, factors, config, paging, device, self._folder)
        for (_, _, parameter), shard, partition in zip(named, self._shards, self._partitions, strict=True):
            if shard.gathered is shard.padded:
                shard.gathered = partition.ds_tensor
                zero_parameter(parameter).ds_tensor.data = partition.ds_tensor.data
            shard.padded = partition.ds_tensor
        self._swapped_in: int | None = None
        for index, values in enumerate(self._zero.fp32_partitioned_groups_flat):
            self._swap_in(index)
            zeros = {name: torch.zeros_like(values.detach()) for name in STATE_NAMES}
            self._zero.optimizer.state[values] = {"step": torch.zeros((), device=values.device), **zeros}
        self._swap_out()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the states on the device."""
        return 0 if self._zero.offload_optimizer else self._bytes

    @property
    def paged_bytes(self) -> int:
        """Bytes of the states in host memory or files."""
        return self._bytes if self._zero.offload_optimizer else 0

    @property
    def _bytes(self) -> int:
        return 2 * 4 * sum(self._zero.fp16_partitioned_groups_flat_numel)

    def copy_values_from_shards(self) -> None:
        """Copy the shards' values to DeepSpeed's fp32 values."""
        for partition, shard in zip(self._partitions, self._shards, strict=True):
            self._view(partition).copy_(shard.padded)
        self._swap_out()

    def update(self, gradients: Sequence[torch.Tensor | None], lr: float, steps: int) -> None:
        """Update all shards with AdamW.

        Args:
            gradients: fp32[n] of each shard in the model's order, summed over all ranks; None for an empty shard.
            lr: learning rate without LoRA+'s factor.
            steps: number of updates, this one included.
        """
        zero = self._zero
        parts = [_padded(g, shard) for g, shard in zip(gradients, self._shards, strict=True)]
        zero.partition_grads(self._partitions, parts)
        zero.independent_gradient_partition_epilogue()
        for group in zero.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        for values in zero.fp32_partitioned_groups_flat:
            zero.optimizer.state[values]["step"].fill_(steps - 1)
        zero.step()

    def read(self) -> list[dict[str, torch.Tensor]]:
        """Return copies of the states, as `PagedOptimizerState.read` does."""
        result = []
        for partition, shard in zip(self._partitions, self._shards, strict=True):
            count = shard.local.numel()
            names = STATE_NAMES if count else ()
            result.append({name: self._view(partition, name)[:count].to("cpu", copy=True) for name in names})
        self._swap_out()
        return result

    def write(self, shards: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Replace all states by what `read` returned, and DeepSpeed's values by the shards' values."""
        for partition, shard, state in zip(self._partitions, self._shards, shards, strict=True):
            for name, values in state.items():
                self._view(partition, name)[: values.numel()].copy_(values.view(-1))
            self._view(partition).copy_(shard.padded)
        self._swap_out()

    def close(self) -> None:
        """Delete the files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @torch.no_grad()
    def _view(self, partition: ZeroParameter, name: str | None = None) -> torch.Tensor:
        """Return a partition's state of that name, or its values; valid until another sub-group is swapped in."""
        index, first, length = self._zero.grad_position[partition.ds_id]
        self._swap_in(index)
        values = self._zero.fp32_partitioned_groups_flat[index]
        whole: torch.Tensor = values.detach() if name is None else self._zero.optimizer.state[values][name]
        return whole.narrow(0, first, length)

    def _swap_in(self, index: int) -> None:
        """Bring a sub-group into memory, and write the one before it back to its file."""
        if index == self._swapped_in:
            return
        self._swap_out()
        self._swapped_in = index
        swap_subgroup_in(self._zero, index)

    def _swap_out(self) -> None:
        if self._swapped_in is not None:
            swap_subgroup_out(self._zero, self._swapped_in)
        self._swapped_in = None


class ZeroAdamW:
    """DeepSpeed's optimizer of fp32 shards, which have values already, with the interface of `PagedAdamW`."""

    def __init__(
        self, shards: Sequence[nn.Parameter], optimizer_state: ZeroOptimizerState, config: OptimConfig
    ) -> None:
        self.shards, self.optimizer_state = list(shards), optimizer_state
        self.lr = config.lr
        self.steps = 0
        optimizer_state.copy_values_from_shards()

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        self.optimizer_state.update([shard.grad for shard in self.shards], self.lr, self.steps)


AdapterOptimizer = PagedAdamW | ZeroAdamW


def _make_swap_folder(paging: PagingConfig) -> Path:
    """Make a folder for this run, because DeepSpeed's files have the same names in all runs."""
    try:
        return Path(tempfile.mkdtemp(prefix="qlora-dist-", dir=paging.dir))
    except OSError as error:
        raise UserError(
            f"{paging.dir}: cannot make a folder for optimizer states there ({error.strerror}); set paging.dir to "
            "another folder, or leave out optim.offload",
            local_only=True,
        ) from None


def _make_optimizer(
    partitions: Sequence[ZeroParameter],
    factors: Sequence[float],
    config: OptimConfig,
    paging: PagingConfig,
    device: torch.device,
    folder: Path | None,
) -> Stage3Optimizer:
    """Return DeepSpeed's optimizer over partitions, one group per factor of the learning rate."""
    groups = [
        {"params": [p for p, f in zip(partitions, factors, strict=True) if f == factor], "lr_factor": factor}
        for factor in sorted(set(factors))
    ]
    settings = zero_optimizer_settings(config, paging, pinned=device.type == "cuda")
    betas = config.beta1, config.beta2
    adamw = torch.optim.AdamW(
        groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )
    stage3 = make_stage3_optimizer(adamw, settings, device, folder)
    for partition in partitions:
        partition.data = partition.ds_tensor  # DeepSpeed has moved the values
    return stage3


def _padded(gradient: torch.Tensor | None, shard: FlatShard) -> torch.Tensor:
    if gradient is None:
        return shard.padded  # an empty shard, which DeepSpeed ignores
    return nn.functional.pad(gradient.view(-1), (0, shard.padded.numel() - gradient.numel()))
