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
    base_buffer: int
    """What the all-gather of the base returns; it is copied out of it. 0 where nothing is sharded."""
    adapter_buffer: int
    one_group: bool
    """Base and adapters are gathered in one collective, or there is one of them only."""
    by_columns: int
    """Of adapters that are cut along columns: copied once more to be put together."""

    @property
    def whole(self) -> int:
        """What the layer computes with."""
        return self.base + self.adapters

    @property
    def buffer(self) -> int:
        """Of a unit that has been gathered ahead."""
        return self.base_buffer + self.adapter_buffer

    @property
    def last_buffer(self) -> int:
        """What stays of the buffers in forward until the next unit has come: FSDP2 lets them overlap."""
        return self.buffer if self.one_group else self.adapter_buffer

    def coming(self, before: int) -> int:
        """The most while it is copied out of its buffers in forward; `before`: what is left of the unit before."""
        if self.one_group:
            return before + self.buffer + self.whole + self.by_columns
        first = before + self.buffer + self.base
        second = self.base_buffer + self.adapter_buffer + self.whole + self.by_columns
        return max(first, second)

    @property
    def coming_back(self) -> int:
        """The same in backward, where a buffer goes as soon as it has been copied."""
        if self.one_group:
            return self.buffer + self.whole + self.by_columns
        return max(self.buffer + self.base, self.adapter_buffer + self.whole + self.by_columns)


def unit_gather_memory(run: RunSpec, unit: FsdpUnit) -> UnitGatherMemory:
    """Of a unit."""
    sharding, base, adapters, by_columns = run.sharding, 0, 0, 0
    for parameter in unit.parameters:
        shards = sharding.adapter_shards if parameter.trained else sharding.base_shards
        nbytes = shard_elements(parameter, shards) * shards * (1 if parameter.is_bytes else run.compute_bytes)
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
