"""A plan: whether a run fits a GPU, the bytes that it moves, and the time of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_dist.plan.calibration_file import MeasuredSpeeds, calibrated_speeds
from qlora_dist.plan.hardware import Gpu, Link
from qlora_dist.plan.memory_estimate import CUDA_CONTEXT_BYTES, MemoryEstimate, estimate_memory
from qlora_dist.plan.run_spec import RunSpec
from qlora_dist.plan.step_time import TIME_UNCERTAINTY, StepTime, data_sheet_speeds, estimate_step_time
from qlora_dist.plan.step_traffic import step_traffic

_DISK_BYTES_PER_S = 2e9  # assumed for a node: local NVMe or a parallel file system
_LOADING_BUFFER_BYTES = 2 * 2**25  # two buffers of 32 MiB that a rank reads into (`model/shard_reader.py`)


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Plan of one run on one kind of GPU."""

    run: RunSpec
    gpu_name: str
    gpu: Gpu
    memory: MemoryEstimate
    traffic: dict[str, int]
    """Bytes that a rank receives in a step, by mesh dimension."""
    intra_node_bytes: int
    """Bytes of `traffic` in collectives among the ranks of a node."""
    inter_node_bytes: int
    """Bytes of `traffic` in collectives that span nodes."""
    time: StepTime
    is_calibrated: bool
    """True if `time` uses speeds that `plan --calibrate` measured."""
    node_host_bytes: int
    """Bytes of a node's host memory, on top of the memory of Python and CUDA."""
    read_bytes: int
    """Bytes that all ranks together read from storage at the start, if the base is in 4 bit."""
    read_16bit_bytes: int
    """Bytes that all ranks together read if the base is quantized on loading."""

    @property
    def fits(self) -> bool:
        """True if even the upper bound of the allocator's reserved memory fits the GPU."""
        return self.memory.fits(self.gpu.memory_bytes)

    @property
    def load_s(self) -> float:
        """Seconds to read a base in 4 bit, each node its share."""
        return self.read_bytes / self.run.nodes / _DISK_BYTES_PER_S

    def as_json(self) -> dict[str, Any]:
        """Return the tree that `plan --json` prints."""
        memory, time = self.memory, self.time
        return {
            "fits": self.fits,
            "gpu": self.gpu_name,
            "card_bytes": self.gpu.memory_bytes,
            "ranks": self.run.shard_counts.world_size,
            "nodes": self.run.nodes,
            "per_rank": {
                "static_bytes": memory.static_bytes,
                "peak_bytes": memory.peak_bytes,
                "reserved_bytes": list(memory.reserved_bytes),
                "context_bytes": CUDA_CONTEXT_BYTES,
                "peak_phase": memory.peak_phase,
                "terms": {**memory.static, **memory.phases[memory.peak_phase]},
                "static_terms": memory.static,
                "phases": {
                    phase: {"bytes": memory.phase_bytes(phase), "terms": terms}
                    for phase, terms in memory.phases.items()
                },
            },
            "host": {"node_bytes": self.node_host_bytes},
            "load": {"bytes": self.read_bytes, "bytes_from_16bit": self.read_16bit_bytes, "s": self.load_s},
            "traffic": {
                "intra_node_bytes": self.intra_node_bytes,
                "inter_node_bytes": self.inter_node_bytes,
                "by_mesh": self.traffic,
            },
            "flops": time.flops,
            "step_s": time.step_s,
            "tokens_per_s": time.tokens_per_s,
            "uncertainty": None if self.is_calibrated else TIME_UNCERTAINTY,
            "busy_s": time.busy_s,
            "bound_by": time.bound_by,
        }


def make_training_plan(
    run: RunSpec, gpu_name: str, gpu: Gpu, link: Link, network: Link, measured: MeasuredSpeeds | None = None
) -> TrainingPlan:
    """Plan a run with `link` between the GPUs of a node, `network` between nodes, and calibrated speeds if any."""
    speed = data_sheet_speeds(run, gpu, link, network)
    if measured is not None:
        speed = calibrated_speeds(measured, speed)
    memory = estimate_memory(run, gpu.memory_bytes)
    sharding = run.shard_counts
    traffic = step_traffic(run.model.units, sharding, run.accumulation, run.compute_bytes)
    sizes = {"shard": min(sharding.base_shards, sharding.adapter_shards), "world": sharding.world_size}
    inter_node_bytes = sum(
        nbytes for dim, nbytes in traffic.items() if sizes.get(dim, sharding.world_size) > run.ranks_per_node
    )
    frozen = [p for unit in run.model.units for p in unit.parameters if not p.trained]
    weights = sum(m.numel for unit in run.model.layers if unit.layer for m in unit.layer.matrices)
    return TrainingPlan(
        run=run,
        gpu_name=gpu_name,
        gpu=gpu,
        memory=memory,
        traffic=traffic,
        intra_node_bytes=sum(traffic.values()) - inter_node_bytes,
        inter_node_bytes=inter_node_bytes,
        time=estimate_step_time(run, memory, speed),
        is_calibrated=measured is not None,
        node_host_bytes=run.ranks_per_node * (_LOADING_BUFFER_BYTES + memory.on_host + memory.paged_moments),
        read_bytes=sum(p.numel * (1 if p.is_quantized else 2) for p in frozen),
        read_16bit_bytes=2 * (weights + sum(p.numel for p in frozen if not p.is_quantized)),
    )
