"""Time of a step by a roofline with overlap, within 30 % if uncalibrated. docs/planning.md derives the formulas."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from qlora_dist.plan.hardware import Gpu, Link
from qlora_dist.plan.layer_spec import LayerSpec
from qlora_dist.plan.memory_estimate import MemoryEstimate, parameter_shard_bytes
from qlora_dist.plan.model_spec import FsdpUnit
from qlora_dist.plan.phase_memory import unit_gather_memory
from qlora_dist.plan.run_spec import RunSpec
from qlora_dist.plan.step_traffic import trained_shard_elements

TIME_UNCERTAINTY = 0.3
"""Relative uncertainty of every time that is not calibrated."""
_ELEMENTWISE_EFFICIENCY = 0.7  # fraction of the memory bandwidth that element-wise kernels reach
_DEQUANTIZE_EFFICIENCY = 0.6  # fraction that bitsandbytes' dequantization reaches


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Time of one optimizer step, and the resources that it takes."""

    step_s: float
    tokens_per_s: float
    """Tokens per second of all ranks."""
    flops: int
    """Floating-point operations of a rank in a step, recomputation included."""
    busy_s: dict[str, float]
    """Seconds that each resource is busy, by name."""
    bound_by: str
    """Name of the resource that is busy longest."""


@dataclass(frozen=True, kw_only=True)
class RankSpeeds:
    """Operations and bytes per second of a rank."""

    flops_per_s: float
    dequantize_bytes_per_s: float
    """Bytes that dequantization reads and writes per second."""
    elementwise_bytes_per_s: float
    """Bytes that element-wise operations read and write per second."""
    intra_node_bytes_per_s: float
    """Bytes per second from the other ranks of its node."""
    inter_node_bytes_per_s: float
    """Bytes per second from other nodes into its node, shared by the node's ranks."""
    host_bytes_per_s: float
    """Bytes per second between device and host memory."""


def data_sheet_speeds(run: RunSpec, gpu: Gpu, link: Link, network: Link) -> RankSpeeds:
    """Return a rank's speeds from data sheets and the fractions of them that programs reach."""
    ranks = run.ranks_per_node
    return RankSpeeds(
        flops_per_s=1e12 * gpu.tflops * gpu.efficiency,
        dequantize_bytes_per_s=1e9 * gpu.memory_gb_s * _DEQUANTIZE_EFFICIENCY,
        elementwise_bytes_per_s=1e9 * gpu.memory_gb_s * _ELEMENTWISE_EFFICIENCY,
        intra_node_bytes_per_s=link.bytes_per_s(ranks),
        inter_node_bytes_per_s=network.bytes_per_s(ranks) * ranks,
        host_bytes_per_s=1e9 * gpu.host_gb_s,
    )


@dataclass(frozen=True)
class KernelWork:
    """Work of one layer's pass over a micro-batch."""

    flops: float
    dequantized_bytes: float
    """Bytes that dequantization reads and writes."""
    streamed_bytes: float
    """Bytes that element-wise operations read and write."""

    def seconds(self, speed: RankSpeeds) -> dict[str, float]:
        """Return the seconds by kind of kernel, which add up because all kernels run in one stream."""
        return {
            "matrix products": self.flops / speed.flops_per_s,
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
    t, c, a = run.tokens, run.compute_bytes, layer.attention
    products, lora, outputs = _flops_per_token(run, layer)
    elements = 4 * c * outputs + 36 * layer.hidden * layer.num_norms + 6 * layer.hidden
    elements += 8 * c * a.heads * a.qk_head_dim + 5 * c * (
        layer.intermediate_size + layer.num_experts_per_tok * layer.hidden
    )
    return KernelWork(
        t * (products + lora + _attention_flops(run, layer)), _dequantized_bytes(run, layer), float(t * elements // 2)
    )


def backward_work(run: RunSpec, layer: LayerSpec, *, checkpointed: bool) -> KernelWork:
    """Return the work of a backward pass, which recomputes a checkpointed layer except for its last product."""
    forward = forward_work(run, layer)
    products, lora, _ = _flops_per_token(run, layer)
    # frozen weights get no gradient; A and B do
    work = KernelWork(
        run.tokens * (products + 2 * lora + 2.5 * _attention_flops(run, layer)),
        _dequantized_bytes(run, layer),
        2 * forward.streamed_bytes,
    )
    if not checkpointed:
        return work
    last = max((m for m in layer.matrices if not m.experts), key=lambda m: m.name == "down_proj")
    recompute = forward + KernelWork(-2.0 * run.tokens * last.numel, 0, 0) if last.name == "down_proj" else forward
    return work + recompute


def head_work(run: RunSpec) -> KernelWork:
    """Return the work of the loss and its gradient: the logits, and their gradient times the weight."""
    logits = run.tokens * run.model.vocabulary
    return KernelWork(4.0 * logits * run.model.hidden, 0, 30.0 * logits)


def _flops_per_token(run: RunSpec, layer: LayerSpec) -> tuple[float, float, float]:
    """Return the operations per token of the base's and the adapters' products, and the elements of their outputs."""
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
    """Return the operations per token of the products with keys and values, in the causal half or the window."""
    a, length = layer.attention, run.seq_len
    window = min(a.window or length, length)
    mean_keys = length if a.is_eager else window * (1 - window / (2 * length))
    return 2.0 * a.heads * (a.qk_head_dim + a.v_head_dim) * mean_keys


def _dequantized_bytes(run: RunSpec, layer: LayerSpec) -> float:
    """Return the bytes read and written to dequantize all matrices once; experts count if a token uses them."""
    total = 0.0
    for m in layer.matrices:
        used = min(1.0, run.tokens * layer.num_experts_per_tok / m.experts) if m.experts else 1.0
        total += used * m.numel * (0.516 + run.compute_bytes)
    return total


def estimate_step_time(run: RunSpec, memory: MemoryEstimate, speed: RankSpeeds) -> StepTime:
    busy: defaultdict[str, float] = defaultdict(float)
    step_s, flops = 0.0, 0.0
    paged_in_fraction = _paged_in_fraction(run, memory)
    checkpointed_share = run.checkpointed / len(run.model.layers)
    for unit, count in run.model.distinct_unit_counts:
        gather = _gather_seconds(run, unit, speed)
        if unit.layer is None:
            # nothing computes meanwhile, so copies from host memory are not hidden and neither is gathering
            fetch = {"paging": _frozen_bytes(run, unit) / speed.host_bytes_per_s} if run.offload else {}
            for name, seconds in _add_seconds(gather, fetch).items():
                step_s += count * seconds * run.accumulation
                busy[name] += count * seconds * run.accumulation
            continue
        page_s = paged_in_fraction * _frozen_bytes(run, unit) / speed.host_bytes_per_s
        page = {"paging": page_s} if paged_in_fraction else {}
        forward = forward_work(run, unit.layer)
        reduce = _reduce_seconds(run, unit, speed)
        for checkpointed, share in ((True, checkpointed_share), (False, 1 - checkpointed_share)):
            if not share:
                continue
            backward = backward_work(run, unit.layer, checkpointed=checkpointed)
            flops += share * count * run.accumulation * (forward.flops + backward.flops)
            for work, sent, times in (
                (forward, gather, run.accumulation),
                (backward, gather, run.accumulation - 1),
                (backward, _add_seconds(gather, reduce), 1),
            ):
                kernels, moved = work.seconds(speed), _add_seconds(sent, page)
                computing, moving = sum(kernels.values()), max([*moved.values(), 0.0])
                # without prefetching, FSDP2 still gathers ahead in backward
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
    return StepTime(
        step_s=step_s, tokens_per_s=tokens / step_s, flops=round(flops), busy_s=dict(busy), bound_by=bound_by
    )


def _add_seconds(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}


def collective_seconds(run: RunSpec, received: float, shards: int, speed: RankSpeeds) -> dict[str, float]:
    """Return the seconds of an all-gather or a reduce-scatter in which a rank receives `received` bytes, by link.

    Inside a node each rank receives over its own link. Between nodes a ring enters each node once, whatever its number
    of ranks, so the node's links together carry the bytes that one rank receives.
    """
    seconds = {}
    if shards > 1 and run.ranks_per_node > 1:
        seconds[INTRA_NODE] = received / speed.intra_node_bytes_per_s
    if shards > run.ranks_per_node:
        seconds[INTER_NODE] = received / speed.inter_node_bytes_per_s
    return seconds


INTRA_NODE, INTER_NODE = "communication inside a node", "communication between nodes"


def _gather_seconds(run: RunSpec, unit: FsdpUnit, speed: RankSpeeds) -> dict[str, float]:
    gather, sharding = unit_gather_memory(run, unit), run.shard_counts
    seconds: dict[str, float] = {}
    for nbytes, shards in ((gather.base_bytes, sharding.base_shards), (gather.adapter_bytes, sharding.adapter_shards)):
        seconds = _add_seconds(seconds, collective_seconds(run, nbytes * (shards - 1) / shards, shards, speed))
    return seconds


def _reduce_seconds(run: RunSpec, unit: FsdpUnit, speed: RankSpeeds) -> dict[str, float]:
    """Return the seconds of reducing a unit's fp32 gradients, by link."""
    shards = run.shard_counts.adapter_shards
    shard = 4 * trained_shard_elements(unit, shards)
    seconds = collective_seconds(run, shard * (shards - 1), shards, speed)
    replicas = run.shard_counts.world_size // shards
    if replicas > 1:  # all ranks reduce their shards at the same time
        per_rank = speed.inter_node_bytes_per_s / run.ranks_per_node
        seconds = _add_seconds(seconds, {INTER_NODE: 2 * shard * (replicas - 1) / replicas / per_rank})
    return seconds


def _frozen_bytes(run: RunSpec, unit: FsdpUnit) -> int:
    return sum(parameter_shard_bytes(run, p) for p in unit.parameters if not p.trained)


def _paged_in_fraction(run: RunSpec, memory: MemoryEstimate) -> float:
    """Return the fraction of the base's layers that is copied from host memory at each use."""
    if run.offload:
        return 1.0
    if not run.is_base_paged:
        return 0.0
    layer_bytes = sum(
        count * _frozen_bytes(run, unit) for unit, count in run.model.distinct_unit_counts if unit.layer is not None
    )
    return 1 - min(1.0, memory.static["base"] / layer_bytes)


def _update_seconds(run: RunSpec, memory: MemoryEstimate, speed: RankSpeeds) -> dict[str, float]:
    """Return the seconds of the optimizer step.

    It reads weights, gradients and moments, writes weights and moments, and moves the paged moments in and out.
    """
    shards = run.shard_counts.adapter_shards
    elements = sum(count * trained_shard_elements(unit, shards) for unit, count in run.model.distinct_unit_counts)
    seconds = {"element-wise operations": 28 * elements / speed.elementwise_bytes_per_s}
    if memory.paged_moments:
        seconds["paging"] = 2 * memory.paged_moments / speed.host_bytes_per_s
    return seconds
