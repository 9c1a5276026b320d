"""ZeRO's own optimizer over the parts that ZeRO-3 has cut: DeepSpeed's partitions, its offload, its files.

`DeepSpeedZeroOptimizer_Stage3` sums gradients after every micro-batch, in hooks on the layers; that of a layer whose
input needs no gradient, as the first one's, comes before there is one. Used here is what lies behind that: it is given
sums over all ranks, and keeps, moves and updates the states. `compat/stage3.py` has what is private to DeepSpeed.
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
    """Both moments of a rank's parts and, with offload, fp32 values of its own, as DeepSpeed keeps them.

    Args:
        model: cut by `zero.parallelize`; its parts lie elsewhere afterwards, one behind the other.
        config: of the update, and where the states are.
        paging: how much is moved at a time, and where files go.
        device: of the parts.

    Raises:
        UserError: there is no such folder.
    """

    bits = 32

    def __init__(self, model: nn.Module, config: OptimConfig, paging: PagingConfig, device: torch.device) -> None:
        self._folder: Path | None = None
        if config.offload == "nvme":
            self._folder = _make_swap_folder(paging)
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
            self._open(index)
            zeros = {name: torch.zeros_like(values.detach()) for name in STATE_NAMES}
            self._zero.optimizer.state[values] = {"step": torch.zeros((), device=values.device), **zeros}
        self._close()

    @property
    def resident_bytes(self) -> int:
        """Of moments, on the device."""
        return 0 if self._zero.offload_optimizer else self._bytes

    @property
    def paged_bytes(self) -> int:
        """Of those in host memory or files."""
        return self._bytes if self._zero.offload_optimizer else 0

    @property
    def _bytes(self) -> int:
        return 2 * 4 * sum(self._zero.fp16_partitioned_groups_flat_numel)

    def copy_values_from_shards(self) -> None:
        """The parts have been given values."""
        for partition, shard in zip(self._partitions, self._shards, strict=True):
            self._view(partition).copy_(shard.padded)
        self._close()

    def update(self, gradients: Sequence[torch.Tensor | None], lr: float, steps: int) -> None:
        """AdamW, by gradients of each part, fp32[n] summed over all ranks, or none of an empty part.

        Args:
            gradients: in the order of the model's parameters.
            lr: learning rate, before the factor of LoRA+.
            steps: how many updates there are with this one.
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
        """What `Moments.read` gives."""
        result = []
        for partition, shard in zip(self._partitions, self._shards, strict=True):
            count = shard.local.numel()
            names = STATE_NAMES if count else ()
            result.append({name: self._view(partition, name)[:count].to("cpu", copy=True) for name in names})
        self._close()
        return result

    def write(self, shards: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Replace all moments by what `read` gave, and values by those of the parts."""
        for partition, shard, moments in zip(self._partitions, self._shards, shards, strict=True):
            for name, values in moments.items():
                self._view(partition, name)[: values.numel()].copy_(values.view(-1))
            self._view(partition).copy_(shard.padded)
        self._close()

    def close(self) -> None:
        """Give the files back."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @torch.no_grad()
    def _view(self, partition: ZeroParameter, name: str | None = None) -> torch.Tensor:
        """A partition's moment of that name, or its values; valid until another sub-group's is asked for."""
        index, first, length = self._zero.grad_position[partition.ds_id]
        self._open(index)
        values = self._zero.fp32_partitioned_groups_flat[index]
        whole: torch.Tensor = values.detach() if name is None else self._zero.optimizer.state[values][name]
        return whole.narrow(0, first, length)

    def _open(self, index: int) -> None:
        """Have a sub-group in memory, and no other whose place is a file."""
        if index == self._swapped_in:
            return
        self._close()
        self._swapped_in = index
        swap_subgroup_in(self._zero, index)

    def _close(self) -> None:
        if self._swapped_in is not None:
            swap_subgroup_out(self._zero, self._swapped_in)
        self._swapped_in = None


class ZeroAdamW:
    """ZeRO's optimizer under the names of `PagedAdamW`.

    Args:
        shards: fp32 parts with values, of which a gradient is taken at each step.
        states: of these parts.
        config: the section `optim`.
    """

    def __init__(
        self, shards: Sequence[nn.Parameter], optimizer_state: ZeroOptimizerState, config: OptimConfig
    ) -> None:
        self.shards, self.moments = list(shards), optimizer_state
        self.lr = config.lr
        self.steps = 0
        """Updates so far, which correct the moments' bias."""
        optimizer_state.copy_values_from_shards()

    @torch.no_grad()
    def step(self) -> None:
        """Update all parts by their gradients; the learning rate is `lr` times each one's factor."""
        self.steps += 1
        self.moments.update([shard.grad for shard in self.shards], self.lr, self.steps)


AdapterOptimizer = PagedAdamW | ZeroAdamW


def _make_swap_folder(paging: PagingConfig) -> Path:
    """DeepSpeed's files have equal names in all runs."""
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
    settings = zero_optimizer_settings(config, paging, device.type == "cuda")
    betas = config.beta1, config.beta2
    adamw = torch.optim.AdamW(
        groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )
    stage3 = make_stage3_optimizer(adamw, settings, device, folder)
    for partition in partitions:
        partition.data = partition.ds_tensor  # the values lie elsewhere now
    return stage3


def _padded(gradient: torch.Tensor | None, shard: FlatShard) -> torch.Tensor:
    if gradient is None:
        return shard.padded  # an empty part, which DeepSpeed leaves out
    return nn.functional.pad(gradient.view(-1), (0, shard.padded.numel() - gradient.numel()))
