"""The memory of a rank's device in each phase of a step, in closed form. Derivations: docs/planning.md."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_dist.plan.model_spec import ParameterSpec
from qlora_dist.plan.phase_memory import StepPhase, peak_terms_by_phase
from qlora_dist.plan.run_spec import RunSpec
from qlora_dist.plan.step_traffic import shard_elements

_MASTER_BYTES = 4  # adapters are trained in fp32


RESERVED_RATIOS = (1.10, 1.20)
"""What torch's allocator reserves, in parts of what is allocated at the peak."""
CUDA_CONTEXT_BYTES = 2**29
"""Of the CUDA context and the libraries' own buffers, in no figure of torch's."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device of one rank, term by term, and what lies behind it."""

    static: dict[str, int]
    """Held between steps."""
    phases: dict[StepPhase, dict[str, int]]
    """On top of that, at the peak of each phase."""
    paged_moments: int = 0
    """Of the optimizer, that come and go."""
    on_host: int = 0
    """Of the base, in host memory or a file."""

    @property
    def static_bytes(self) -> int:
        """Between steps."""
        return sum(self.static.values())

    @property
    def weights_bytes(self) -> int:
        """What a run compares with its share after loading: static, without moments."""
        return self.static_bytes - self.static["moments"]

    def phase_bytes(self, phase: StepPhase) -> int:
        """All that is allocated at the peak of a phase."""
        return self.static_bytes + sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> StepPhase:
        """The phase that needs most."""
        return max(self.phases, key=self.phase_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most that is allocated at any time."""
        return self.phase_bytes(self.peak_phase)

    @property
    def reserved_bytes(self) -> tuple[int, int]:
        """What the allocator will have taken of the device: from, to."""
        return round(self.peak_bytes * RESERVED_RATIOS[0]), round(self.peak_bytes * RESERVED_RATIOS[1])

    def fits(self, card_bytes: int) -> bool:
        """Whether even the upper end, with the context, has room on a card."""
        return self.reserved_bytes[1] + CUDA_CONTEXT_BYTES <= card_bytes


def static_memory_terms(run: RunSpec) -> dict[str, int]:
    """What a rank holds between steps, if nothing is paged or offloaded: exact.

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
    """Of a rank's shard of a parameter, as it is kept."""
    if parameter.trained:
        return _MASTER_BYTES * shard_elements(parameter, run.shard_counts.adapter_shards)
    element = 1 if parameter.is_quantized else run.compute_bytes
    return element * shard_elements(parameter, run.shard_counts.base_shards)


def optimizer_state_bytes(run: RunSpec) -> int:
    """Both moments of a rank's adapter shards, wherever they lie: of whole blocks of 256 elements of each shard.

    fp32, or in 8 bit a byte each and an fp32 scale a block (`optim/state_pages.py`).
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
    """All of it.

    Args:
        run: what is planned.
        card_bytes: of the device, by which paged moments and a paged base settle on how many stay; None: all stay
            whose number the configuration does not say.
    """
    static, phases = static_memory_terms(run), peak_terms_by_phase(run)
    host_base_bytes = 0
    if run.offload:
        host_base_bytes, static["base"], static["embeddings and norms"] = (
            static["base"] + static["embeddings and norms"],
            0,
            0,
        )
    if run.is_base_paged:
        pages = [
            sum(
                -(-parameter_shard_bytes(run, p) // _PAGE_ALIGNMENT) * _PAGE_ALIGNMENT
                for p in unit.parameters
                if not p.trained
            )
            for unit in run.model.layers
        ]
        rest = static["embeddings and norms"] + 4 * static["adapters"]
        frozen_of_layers = sum(
            parameter_shard_bytes(run, p) for u in run.model.layers for p in u.parameters if not p.trained
        )
        static["embeddings and norms"] -= frozen_of_layers - static["base"]  # norms and biases are in the pages
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


_PAGE_ALIGNMENT = 16  # of a parameter in a page (`compat/fsdp.py`)


def _resident_page_bytes(pages: list[int], budget: int, prefetch: int) -> int:
    """What `paging/pager.py` has on the device: all pages; or some that stay, and slots for the others."""
    if sum(pages) <= budget:
        return sum(pages)
    largest = max(pages)
    budget = max(budget, 2 * largest)
    slots = min(max(2, 1 + prefetch), budget // largest)
    resident_pages = min((budget - slots * largest) // largest, len(pages))
    return (slots + resident_pages) * largest
