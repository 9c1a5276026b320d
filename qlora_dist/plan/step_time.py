"""How long a step takes, by a roofline with overlap. Uncalibrated: +-30 %. Derivations: docs/planning.md."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from qlora_dist.plan.gather_memory import unit_gather_memory
from qlora_dist.plan.hardware import Gpu, Link
from qlora_dist.plan.layer_spec import LayerSpec
from qlora_dist.plan.memory_estimate import MemoryEstimate, parameter_shard_bytes
from qlora_dist.plan.model_spec import FsdpUnit
from qlora_dist.plan.run_spec import RunSpec
from qlora_dist.plan.step_traffic import trained_shard_elements

TIME_UNCERTAINTY = 0.3
"""Of every time that is not calibrated."""
_ELEMENTWISE_EFFICIENCY = 0.7  # part of the memory bandwidth that element-wise kernels reach
_DEQUANTIZE_EFFICIENCY = 0.6  # and bitsandbytes' dequantization


@dataclass(frozen=True)
class StepTime:
    """Of one optimizer step."""

    step_s: float
    tokens_per_s: float
    """Of all ranks."""
    flops: int
    """Of a rank in a step; what is computed again counts."""
    busy_s: dict[str, float]
    """What each resource would take by itself."""
    bound_by: str


@dataclass(frozen=True)
class RankSpeeds:
    """What a rank has: bytes and operations per second."""

    flops: float
    dequantize_bytes_per_s: float
    """Bytes read and written by it."""
    elementwise_bytes_per_s: float
    """By element-wise operations."""
    inside: float
    """To the ranks of its node."""
    inter_node_bytes_per_s: float
    """Into its node from all others; shared by the node's ranks."""
    host: float


def data_sheet_speeds(run: RunSpec, gpu: Gpu, link: Link, network: Link) -> RankSpeeds:
    """Of a rank, from data sheets and the parts of them that are reached."""
    ranks = run.ranks_per_node
    return RankSpeeds(
        1e12 * gpu.tflops * gpu.efficiency,
        1e9 * gpu.memory_gb_s * _DEQUANTIZE_EFFICIENCY,
        1e9 * gpu.memory_gb_s * _ELEMENTWISE_EFFICIENCY,
        link.bytes_per_s(ranks),
        network.bytes_per_s(ranks) * ranks,
        1e9 * gpu.host_gb_s,
    )


@dataclass(frozen=True)
class KernelWork:
    """Of a pass of one layer over a micro-batch."""

    flops: float
    dequantized_bytes: float
    """Read and written for it."""
    streamed_bytes: float
    """Of element-wise operations."""

    def seconds(self, speed: RankSpeeds) -> dict[str, float]:
        """One after the other: they are kernels of one stream."""
        return {
            "matrix products": self.flops / speed.flops,
            "dequantization": self.dequantized_bytes / speed.dequantize_bytes_per_s,
            "element-wise operations": self.streamed_bytes / speed.elementwise_bytes_per_s,
        }

    def __add__(self, other: KernelWork) -> KernelWork:
        return KernelWork(
            self.flops + other.flops,
            self.dequantized_bytes + other.dequantized_bytes,
            self.streamed_bytes + other.streamed_bytes,
        )


def forward_work(run: RunSpec, layer: LayerSpec) -> KernelWork:
    """Of a forward pass."""
    t, c, a = run.tokens, run.compute_bytes, layer.attention
    products, lora, outputs = _flops_per_token(run, layer)
    elements = 4 * c * outputs + 36 * layer.hidden * layer.num_norms + 6 * layer.hidden
    elements += 8 * c * a.heads * a.qk_head_dim + 5 * c * (
        layer.intermediate_size + layer.num_experts_per_tok * layer.hidden
    )
    return KernelWork(
        t * (products + lora + _attention_flops(run, layer)), _dequantized_bytes(run, layer), float(t * elements // 2)
    )


def backward_work(run: RunSpec, layer: LayerSpec, checkpointed: bool) -> KernelWork:
    """Of a backward pass, with the second forward pass of a checkpointed layer: all but its last product."""
    forward = forward_work(run, layer)
    products, lora, _ = _flops_per_token(run, layer)
    # of frozen weights no gradient, of A and B both
    work = KernelWork(
        run.tokens * (products + 2 * lora + 2.5 * _attention_flops(run, layer)),
        _dequantized_bytes(run, layer),
        2 * forward.streamed_bytes,
    )
    if not checkpointed:
        return work
    last = max((m for m in layer.matrices if not m.experts), key=lambda m: m.name == "down_proj")
    again = forward + KernelWork(-2.0 * run.tokens * last.numel, 0, 0) if last.name == "down_proj" else forward
    return work + again


def head_work(run: RunSpec) -> KernelWork:
    """The loss with its gradient: logits, and their gradient times the weight."""
    model = run.model
    logits = run.tokens * model.vocabulary
    return KernelWork(4.0 * logits * model.hidden, 0, 30.0 * logits)


def _flops_per_token(run: RunSpec, layer: LayerSpec) -> tuple[float, float, float]:
    """Operations of the products with the base and with the adapters, and elements of their outputs."""
    products = lora = outputs = 0.0
    for m in layer.matrices:
        used = layer.num_experts_per_tok if m.experts else 1
        rows = m.rows * m.parts
        products += 2 * used * rows * m.in_features
        outputs += used * rows
        if m.has_lora:
            lora += 2 * used * run.model.r * (rows + m.in_features)
    return products, lora, outputs


def _attention_flops(run: RunSpec, layer: LayerSpec) -> float:
    """For each token, queries by keys and probabilities by values, of half the square or what a window leaves of it."""
    a, length = layer.attention, run.seq_len
    window = min(a.window or length, length)
    seen = length if a.is_eager else window * (1 - window / (2 * length))
    return 2.0 * a.heads * (a.qk_head_dim + a.v_head_dim) * seen


def _dequantized_bytes(run: RunSpec, layer: LayerSpec) -> float:
    """Bytes read and written to dequantize all matrices once; of experts those that a token chose."""
    total = 0.0
    for m in layer.matrices:
        used = 1.0
        if m.experts:
            used = min(1.0, run.tokens * layer.num_experts_per_tok / m.experts)
        total += used * m.numel * (0.516 + run.compute_bytes)
    return total


def estimate_step_time(run: RunSpec, memory: MemoryEstimate, speed: RankSpeeds) -> StepTime:
    """Of a step."""
    busy: defaultdict[str, float] = defaultdict(float)
    step_s, flops = 0.0, 0.0
    paged_in_fraction = _paged_in_fraction(run, memory)
    checkpointed_share = run.checkpointed / len(run.model.layers)
    for unit, count in run.model.distinct_unit_counts:
        gather = _gather_seconds(run, unit, speed)
        if unit.layer is None:
            # nothing computes meanwhile: what lies in host memory is waited for, as the gathering is
            fetch = {"paging": _frozen_bytes(run, unit) / speed.host} if run.offload else {}
            for name, seconds in _add_seconds(gather, fetch).items():
                step_s += count * seconds * run.accumulation
                busy[name] += count * seconds * run.accumulation
            continue
        page = {"paging": paged_in_fraction * _frozen_bytes(run, unit) / speed.host} if paged_in_fraction else {}
        forward = forward_work(run, unit.layer)
        backward_with_recompute = backward_work(run, unit.layer, True)
        backward_without_recompute = backward_work(run, unit.layer, False)
        reduce = _reduce_seconds(run, unit, speed)
        for backward, share in (
            (backward_with_recompute, checkpointed_share),
            (backward_without_recompute, 1 - checkpointed_share),
        ):
            if not share:
                continue
            flops += share * count * run.accumulation * (forward.flops + backward.flops)
            for work, sent, times in (
                (forward, gather, run.accumulation),
                (backward, gather, run.accumulation - 1),
                (backward, _add_seconds(gather, reduce), 1),
            ):
                kernels, moved = work.seconds(speed), _add_seconds(sent, page)
                computing, moving = sum(kernels.values()), max([*moved.values(), 0.0])
                # asked for no prefetching, FSDP2 gathers ahead in backward all the same
                overlaps = run.prefetch > 0 or work is not forward
                spent = max(computing, moving) if overlaps else computing + sum(moved.values())
                step_s += share * count * times * spent
                for name, seconds in [*kernels.items(), *moved.items()]:
                    busy[name] += share * count * times * seconds
    head = head_work(run)
    flops += run.accumulation * head.flops
    for name, seconds in head.seconds(speed).items():
        busy[name] += run.accumulation * seconds
        step_s += run.accumulation * seconds
    for name, seconds in _update_seconds(run, memory, speed).items():
        busy[name] += seconds
        step_s += seconds
    bound_by = max(busy, key=lambda name: busy[name])
    tokens = run.tokens * run.accumulation * run.shard_counts.world_size
    return StepTime(step_s, tokens / step_s, round(flops), dict(busy), bound_by)


def _add_seconds(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}


def collective_seconds(run: RunSpec, received: float, shards: int, speed: RankSpeeds) -> dict[str, float]:
    """Of an all-gather or a reduce-scatter in which a rank receives so many bytes.

    Inside a node every rank's own link carries them. Between nodes a ring enters each node once, whatever its number
    of ranks: the node's links together carry what one rank receives.
    """
    if shards == 1:
        return {}
    if shards <= run.ranks_per_node:
        return {INTRA_NODE: received / speed.inside}
    if run.ranks_per_node == 1:
        return {INTER_NODE: received / speed.inter_node_bytes_per_s}
    return {INTRA_NODE: received / speed.inside, INTER_NODE: received / speed.inter_node_bytes_per_s}


INTRA_NODE, INTER_NODE = "communication inside a node", "communication between nodes"


def _gather_seconds(run: RunSpec, unit: FsdpUnit, speed: RankSpeeds) -> dict[str, float]:
    """Of one gathering of a unit."""
    gather, sharding = unit_gather_memory(run, unit), run.shard_counts
    seconds: dict[str, float] = {}
    for nbytes, shards in ((gather.base, sharding.base_shards), (gather.adapters, sharding.adapter_shards)):
        seconds = _add_seconds(seconds, collective_seconds(run, nbytes * (shards - 1) / shards, shards, speed))
    return seconds


def _reduce_seconds(run: RunSpec, unit: FsdpUnit, speed: RankSpeeds) -> dict[str, float]:
    """Of summing a unit's gradients, fp32."""
    shards = run.shard_counts.adapter_shards
    shard = 4 * trained_shard_elements(unit, shards)
    seconds = collective_seconds(run, shard * (shards - 1), shards, speed)
    replicas = run.shard_counts.world_size // shards
    if replicas > 1:  # every rank its own shard, all at once
        per_rank = speed.inter_node_bytes_per_s / run.ranks_per_node
        seconds = _add_seconds(seconds, {INTER_NODE: 2 * shard * (replicas - 1) / replicas / per_rank})
    return seconds


def _frozen_bytes(run: RunSpec, unit: FsdpUnit) -> int:
    return sum(parameter_shard_bytes(run, p) for p in unit.parameters if not p.trained)


def _paged_in_fraction(run: RunSpec, memory: MemoryEstimate) -> float:
    """Of the base's layers, what comes from host memory at each use."""
    if run.offload:
        return 1.0
    if not run.is_base_paged:
        return 0.0
    whole = sum(
        count * _frozen_bytes(run, unit) for unit, count in run.model.distinct_unit_counts if unit.layer is not None
    )
    return 1 - min(1.0, memory.static["base"] / whole)


def _update_seconds(run: RunSpec, memory: MemoryEstimate, speed: RankSpeeds) -> dict[str, float]:
    """Weight, gradient and moments are read, weight and moments written; pages that moved come and go."""
    shards = run.shard_counts.adapter_shards
    elements = sum(count * trained_shard_elements(unit, shards) for unit, count in run.model.distinct_unit_counts)
    seconds = {"element-wise operations": 28 * elements / speed.elementwise_bytes_per_s}
    if memory.paged_moments:
        seconds["paging"] = 2 * memory.paged_moments / speed.host
    return seconds
