"""How much of a unit is on a device while FSDP2 gathers and uses it. Read off torch 2.13's `_fsdp_param_group.py`."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_dist.plan.model_spec import FsdpUnit
from qlora_dist.plan.run_spec import RunSpec
from qlora_dist.plan.step_traffic import is_column_sharded, shard_elements


@dataclass(frozen=True)
class UnitGatherMemory:
    """Bytes of a unit's parameters, whole and padded, in the type in which they are gathered."""

    base: int
    adapters: int
    base_buffer_bytes: int
    """What the all-gather of the base returns; it is copied out of it. 0 where nothing is sharded."""
    adapter_buffer_bytes: int
    one_group: bool
    """Base and adapters are gathered in one collective, or there is one of them only."""
    column_sharded_bytes: int
    """Of adapters that are cut along columns: copied once more to be put together."""

    @property
    def whole(self) -> int:
        """What the layer computes with."""
        return self.base + self.adapters

    @property
    def buffer_bytes(self) -> int:
        """Of a unit that has been gathered ahead."""
        return self.base_buffer_bytes + self.adapter_buffer_bytes

    @property
    def retained_buffer_bytes(self) -> int:
        """What stays of the buffers in forward until the next unit has come: FSDP2 lets them overlap."""
        return self.buffer_bytes if self.one_group else self.adapter_buffer_bytes

    def peak_during_gather(self, previous_buffer_bytes: int) -> int:
        """The most while it is copied out of its buffers in forward; `previous_buffer_bytes`: what is left of the unit before."""
        if self.one_group:
            return previous_buffer_bytes + self.buffer_bytes + self.whole + self.column_sharded_bytes
        first = previous_buffer_bytes + self.buffer_bytes + self.base
        second = self.base_buffer_bytes + self.adapter_buffer_bytes + self.whole + self.column_sharded_bytes
        return max(first, second)

    @property
    def coming_back(self) -> int:
        """The same in backward, where a buffer goes as soon as it has been copied."""
        if self.one_group:
            return self.buffer_bytes + self.whole + self.column_sharded_bytes
        return max(self.buffer_bytes + self.base, self.adapter_buffer_bytes + self.whole + self.column_sharded_bytes)


def unit_gather_memory(run: RunSpec, unit: FsdpUnit) -> UnitGatherMemory:
    """Of a unit."""
    sharding, base, adapters, by_columns = run.shard_counts, 0, 0, 0
    for parameter in unit.parameters:
        shards = sharding.adapter_shards if parameter.trained else sharding.base_shards
        nbytes = shard_elements(parameter, shards) * shards * (1 if parameter.is_quantized else run.compute_bytes)
        if parameter.trained:
            adapters += nbytes
            by_columns += nbytes if shards > 1 and is_column_sharded(parameter, shards) else 0
        else:
            base += nbytes
    one_mesh = sharding.base_shards == sharding.adapter_shards == sharding.world_size and not run.offload
    return UnitGatherMemory(
        base,
        adapters,
        base if sharding.base_shards > 1 else 0,
        adapters if sharding.adapter_shards > 1 else 0,
        one_mesh or not (base and adapters),
        by_columns,
    )
