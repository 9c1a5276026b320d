"""The memory of a rank's device in each phase of a step, in closed form. Derivations: docs/planning.md."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_dist.plan.run import Run
from qlora_dist.plan.shapes import Parameter
from qlora_dist.plan.step import Phase, step_phases
from qlora_dist.plan.traffic import shard_elements

_MASTER_BYTES = 4  # adapters are trained in fp32


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one rank, term by term."""

    static: dict[str, int]
    """Held between steps."""
    phases: dict[Phase, dict[str, int]]
    """On top of that, at the peak of each phase."""

    @property
    def static_bytes(self) -> int:
        """Between steps."""
        return sum(self.static.values())

    @property
    def weights_bytes(self) -> int:
        """What the run compares with its share after loading: static, without moments."""
        return self.static_bytes - self.static["moments"]

    @property
    def peak_phase(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak_bytes(self) -> int:
        """The most that is allocated at any time."""
        return self.static_bytes + sum(self.phases[self.peak_phase].values())


def static_terms(run: Run) -> dict[str, int]:
    """What a rank holds between steps, if nothing is paged or offloaded: exact.

    Shards are padded as FSDP2 pads them (`shard_elements`).
    """
    terms = {"base": 0, "embeddings and norms": 0, "adapters": 0}
    for unit in run.model.units:
        for parameter in unit.parameters:
            nbytes = shard_bytes(run, parameter)
            if parameter.trained:
                terms["adapters"] += nbytes
            elif parameter.is_bytes and unit.kind == "layer":
                terms["base"] += nbytes
            else:
                terms["embeddings and norms"] += nbytes
    terms["buffers"] = run.model.buffer_bytes
    terms["moments"] = moment_bytes(run)
    return terms


def shard_bytes(run: Run, parameter: Parameter) -> int:
    """Of a rank's shard of a parameter, as it is kept."""
    if parameter.trained:
        return _MASTER_BYTES * shard_elements(parameter, run.sharding.adapter_shards)
    element = 1 if parameter.is_bytes else run.compute_bytes
    return element * shard_elements(parameter, run.sharding.base_shards)


def moment_bytes(run: Run) -> int:
    """Both moments of a rank's adapter shards, wherever they lie: of whole blocks of 256 elements of each shard.

    fp32, or in 8 bit a byte each and an fp32 scale a block (`optim/layout.py`).
    """
    block = 2 * 4 * 256 if run.moment_bits == 32 else 2 * (256 + 4)
    shards = (
        -(-shard_elements(p, run.sharding.adapter_shards) // 256)
        for unit in run.model.units
        for p in unit.parameters
        if p.trained
    )
    return block * sum(shards)


def plan_memory(run: Run) -> Memory:
    """All of it, if nothing is paged or offloaded."""
    static = static_terms(run)
    return Memory(static, step_phases(run))
