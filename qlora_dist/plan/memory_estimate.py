"""Closed-form memory of a rank's device in each phase of a step. docs/planning.md derives the formulas."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_dist.plan.model_spec import ParameterSpec
from qlora_dist.plan.phase_memory import StepPhase, peak_terms_by_phase
from qlora_dist.plan.run_spec import RunSpec
from qlora_dist.plan.step_traffic import shard_elements
from qlora_dist.runtime.byte_sizes import align_bytes

_MASTER_BYTES = 4  # adapters are trained in fp32
RESERVED_RATIOS = (1.10, 1.20)
"""Lower and upper ratio of the bytes that torch's allocator reserves to the allocated peak."""
CUDA_CONTEXT_BYTES = 2**29
"""Bytes of the CUDA context and of libraries' buffers, which no figure of torch includes."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device of one rank, term by term, and the bytes that are paged or on the host."""

    static: dict[str, int]
    """Bytes held between steps."""
    phases: dict[StepPhase, dict[str, int]]
    """Bytes on top of `static` at the peak of each phase."""
    paged_moments: int = 0
    """Bytes of optimizer state that move in and out in each step."""
    on_host: int = 0
    """Bytes of the base in host memory or a file."""

    @property
    def static_bytes(self) -> int:
        return sum(self.static.values())

    @property
    def weights_bytes(self) -> int:
        """Bytes held between steps without optimizer state, as a run measures them after loading."""
        return self.static_bytes - self.static["moments"]

    def phase_bytes(self, phase: StepPhase) -> int:
        """Return all bytes that are allocated at the peak of a phase."""
        return self.static_bytes + sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> StepPhase:
        return max(self.phases, key=self.phase_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.phase_bytes(self.peak_phase)

    @property
    def reserved_bytes(self) -> tuple[int, int]:
        """Lower and upper bound of the bytes that the allocator reserves."""
        return round(self.peak_bytes * RESERVED_RATIOS[0]), round(self.peak_bytes * RESERVED_RATIOS[1])

    def fits(self, card_bytes: int) -> bool:
        """Return whether the upper bound fits a card together with the CUDA context."""
        return self.reserved_bytes[1] + CUDA_CONTEXT_BYTES <= card_bytes


def static_memory_terms(run: RunSpec) -> dict[str, int]:
    """Return the exact bytes that a rank holds between steps if nothing is paged or offloaded.

    Shards are padded as FSDP2 pads them (`shard_elements`).
    """
    terms = {"base": 0, "embeddings and norms": 0, "adapters": 0}
    for unit, count in run.model.distinct_unit_counts:
        for parameter in unit.parameters:
            nbytes = count * parameter_shard_bytes(run, parameter)
            if parameter.trained:
                terms["adapters"] += nbytes
            elif parameter.is_quantized and unit.kind == "layer":
                terms["base"] += nbytes
            else:
                terms["embeddings and norms"] += nbytes
    terms["buffers"] = run.model.buffer_bytes
    terms["moments"] = optimizer_state_bytes(run)
    return terms


def parameter_shard_bytes(run: RunSpec, parameter: ParameterSpec) -> int:
    if parameter.trained:
        return _MASTER_BYTES * shard_elements(parameter, run.shard_counts.adapter_shards)
    element = 1 if parameter.is_quantized else run.compute_bytes
    return element * shard_elements(parameter, run.shard_counts.base_shards)


def optimizer_state_bytes(run: RunSpec) -> int:
    """Return the bytes of both moments of a rank's adapter shards, wherever they are stored.

    Each shard is rounded up to blocks of 256 elements. A moment is fp32, or one byte per element and an fp32 scale per
    block (`optim/state_pages.py`).
    """
    block = 2 * 4 * 256 if run.optimizer_bits == 32 else 2 * (256 + 4)
    shards = (
        count * -(-shard_elements(p, run.shard_counts.adapter_shards) // 256)
        for unit, count in run.model.distinct_unit_counts
        for p in unit.parameters
        if p.trained
    )
    return block * sum(shards)


def estimate_memory(run: RunSpec, card_bytes: int | None = None) -> MemoryEstimate:
    """Estimate the memory of a run.

    `card_bytes` limits the resident part of a paged base and of paged moments. None means that everything stays
    resident unless the configuration limits it.
    """
    static, phases = static_memory_terms(run), peak_terms_by_phase(run)
    host_base_bytes = 0
    if run.offload:
        host_base_bytes = static["base"] + static["embeddings and norms"]
        static |= {"base": 0, "embeddings and norms": 0}
    if run.is_base_paged:
        frozen = [[parameter_shard_bytes(run, p) for p in u.parameters if not p.trained] for u in run.model.layers]
        pages = [sum(map(align_bytes, sizes)) for sizes in frozen]
        rest = static["embeddings and norms"] + 4 * static["adapters"]
        static["embeddings and norms"] -= sum(map(sum, frozen)) - static["base"]  # norms and biases are in the pages
        budget = run.base_resident_bytes
        if budget is None:
            budget = (
                sum(pages) if card_bytes is None else max(2 * max(pages), (card_bytes - CUDA_CONTEXT_BYTES - rest) // 2)
            )
        static["base"] = _resident_page_bytes(pages, budget, run.ahead)
        host_base_bytes = sum(pages) if static["base"] < sum(pages) else 0
    moments = static["moments"]
    if run.paged_moments and moments:
        budget = run.optimizer_resident_bytes
        if budget is None:
            budget = moments
            if card_bytes is not None:
                without_optimizer = MemoryEstimate({**static, "moments": 0}, phases)
                budget = max(
                    0, card_bytes - card_bytes // 20 - without_optimizer.reserved_bytes[0] - CUDA_CONTEXT_BYTES
                )
        page = run.page_bytes
        pages = [page] * (moments // page) + [moments % page] * bool(moments % page)
        static["moments"] = _resident_page_bytes(pages, budget, run.ahead)
    return MemoryEstimate(static, phases, moments - static["moments"], host_base_bytes)


def _resident_page_bytes(pages: list[int], budget: int, prefetch: int) -> int:
    """Return the bytes that `paging/pager.py` holds on the device: all pages, or resident ones and slots."""
    if sum(pages) <= budget:
        return sum(pages)
    largest = max(pages)
    budget = max(budget, 2 * largest)
    slots = min(max(2, 1 + prefetch), budget // largest)
    resident_pages = min((budget - slots * largest) // largest, len(pages))
    return (slots + resident_pages) * largest
