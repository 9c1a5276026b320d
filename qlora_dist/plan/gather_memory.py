"""Memory of a unit while FSDP2 gathers and uses it, as read off torch 2.13's `_fsdp_param_group.py`."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_dist.plan.model_spec import FsdpUnit
from qlora_dist.plan.run_spec import RunSpec
from qlora_dist.plan.step_traffic import is_column_sharded, shard_elements


@dataclass(frozen=True, kw_only=True)
class UnitGatherMemory:
    """Bytes of a unit's parameters, unsharded and padded, in the type in which they are gathered."""

    base_bytes: int
    adapter_bytes: int
    base_buffer_bytes: int
    """Bytes of the buffer that the base's all-gather fills; 0 where nothing is sharded."""
    adapter_buffer_bytes: int
    has_one_group: bool
    """True if base and adapters share one collective, or if the unit has only one of them."""
    column_sharded_bytes: int
    """Bytes of adapters that are sharded along columns, which are copied once more to be put together."""

    @property
    def unsharded_bytes(self) -> int:
        """Bytes of the parameters that the layer computes with."""
        return self.base_bytes + self.adapter_bytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of a unit that has been prefetched."""
        return self.base_buffer_bytes + self.adapter_buffer_bytes

    @property
    def retained_buffer_bytes(self) -> int:
        """Bytes of the buffers that FSDP2 keeps in forward until the next unit is copied out, for overlap."""
        return self.buffer_bytes if self.has_one_group else self.adapter_buffer_bytes

    def peak_during_gather(self, previous_buffer_bytes: int) -> int:
        """Return the peak bytes while the gathered buffers are copied out in forward.

        Args:
            previous_buffer_bytes: bytes that the previous unit's buffers still hold.
        """
        last_group = self.buffer_bytes + self.unsharded_bytes + self.column_sharded_bytes
        if self.has_one_group:
            return previous_buffer_bytes + last_group
        return max(previous_buffer_bytes + self.buffer_bytes + self.base_bytes, last_group)


def unit_gather_memory(run: RunSpec, unit: FsdpUnit) -> UnitGatherMemory:
    """Return the gather memory of a unit."""
    sharding, base, adapters, column_sharded = run.shard_counts, 0, 0, 0
    for parameter in unit.parameters:
        shards = sharding.adapter_shards if parameter.trained else sharding.base_shards
        nbytes = shard_elements(parameter, shards) * shards * (1 if parameter.is_quantized else run.compute_bytes)
        if parameter.trained:
            adapters += nbytes
            column_sharded += nbytes if shards > 1 and is_column_sharded(parameter, shards) else 0
        else:
            base += nbytes
    one_mesh = sharding.base_shards == sharding.adapter_shards == sharding.world_size and not run.offload
    return UnitGatherMemory(
        base_bytes=base,
        adapter_bytes=adapters,
        base_buffer_bytes=base if sharding.base_shards > 1 else 0,
        adapter_buffer_bytes=adapters if sharding.adapter_shards > 1 else 0,
        has_one_group=one_mesh or not (base and adapters),
        column_sharded_bytes=column_sharded,
    )
