"""An out-of-memory error is answered with what would have fitted, in bytes, by the planner's formulas."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qlora_dist.config.config_file import ConfigChanges, apply_changes
from qlora_dist.errors import UserError
from qlora_dist.plan.hardware import load_hardware
from qlora_dist.plan.memory_estimate import CUDA_CONTEXT_BYTES, RESERVED_RATIOS, MemoryEstimate, estimate_memory
from qlora_dist.plan.print_plan import PHASE_LABELS
from qlora_dist.plan.run_spec import RunSpec
from qlora_dist.plan.step_time import RankSpeeds, data_sheet_speeds, estimate_step_time
from qlora_dist.runtime.byte_sizes import format_bytes
from qlora_dist.runtime.device_memory import free_memory_bytes, peak_memory_bytes, process_resident_bytes
from qlora_dist.train.prediction import device_speeds, planned_run
from qlora_dist.train.run_setup import RunSetup

_MAX_SUGGESTIONS = 3


@dataclass(frozen=True)
class Suggestion:
    """What could be set."""

    severity: int
    """0: what is computed stays the same but for rounding; 1: fewer bits; 2: it is another training."""
    sections: ConfigChanges

    @property
    def setting(self) -> str:
        """As the command line takes it."""
        return " ".join(
            f"{section}.{key}={v}" for section, values in self.sections.items() for key, v in values.items()
        )


@contextmanager
def explain_out_of_memory(setup: RunSetup) -> Iterator[None]:
    """Turn an out-of-memory error of this rank into a sentence that says what to change.

    Raises:
        UserError: in its place. Of this rank alone: the others end with it.
    """
    before = process_resident_bytes()
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sentence = out_of_memory_message(setup, str(error), before)
        raise UserError(sentence, local_only=True) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device's allocator, torch's for CPUs, or Python."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator: " in str(error) or "CUDA out of memory" in str(error)


def out_of_memory_message(setup: RunSetup, message: str, initial_resident_bytes: int) -> str:
    """What to say.

    Args:
        setup: of the run.
        message: of the error.
        initial_resident_bytes: resident bytes of the process before anything was loaded.
    """
    available_bytes = _available_bytes(setup, message, initial_resident_bytes)
    beginning = f"out of memory: the rank had {format_bytes(available_bytes)} for tensors"
    try:
        run = planned_run(setup, setup.config)
        memory = _plan_memory(run, setup, available_bytes)
        limit = int(
            min(available_bytes, memory.peak_bytes) / RESERVED_RATIOS[1]
        )  # allocators reserve more than is asked for
        device_speed = device_speeds(setup.device, run)[0] or _reference_speeds(run)
        single = [
            (change, *_predict_suggestion(setup, change, available_bytes, device_speed))
            for change in iter_suggestions(setup)
        ]
    except Exception as error:  # the model is one that nobody has planned
        return f"{beginning}, and there is no plan of what it needs ({error}); lower train.micro_batch or data.seq_len"
    needs = (
        f"{beginning} and needs {format_bytes(memory.peak_bytes)} by its plan, {format_bytes(memory.static_bytes)} between steps and "
        f"{format_bytes(memory.peak_bytes - memory.static_bytes)} more {PHASE_LABELS[memory.peak_phase]}"
    )
    fitting: dict[str, tuple[int, float, str]] = {}
    for change, peak, rate in single:
        if peak <= limit:  # of several values of one key the first
            fitting.setdefault(
                change.setting.partition("=")[0], (change.severity, -rate, f"{change.setting} ({format_bytes(peak)})")
            )
    if fitting:
        return f"{needs}; set {', or '.join(text for _, _, text in sorted(fitting.values())[:_MAX_SUGGESTIONS])}"
    settings, least = combine_suggestions(setup, single, limit, available_bytes)
    if least <= limit:
        return f"{needs}; set {settings} ({format_bytes(least)}), all of them"
    return f"{needs}; nothing that can be set is enough (with {settings} {format_bytes(least)}), so take more ranks"


def iter_suggestions(setup: RunSetup) -> Iterator[Suggestion]:
    """What could be set to need less memory, each of them by itself."""
    config, world = setup.config, setup.ranks.world_size
    train, parallel, optim, model = config.train, config.parallel, config.optim, config.model
    if train.checkpointing != "full":
        yield _suggest(0, train={"checkpointing": "full"})
    micro_batch = train.micro_batch
    while micro_batch % 2 == 0:
        micro_batch //= 2
        yield _suggest(0, train={"micro_batch": micro_batch})
    if parallel.base != "paged":
        shards = setup.sizes.base_shards
        named = {"node": setup.ranks.local_world_size, "world": world}
        for base, count in named.items():
            if count > shards:
                yield _suggest(0, parallel={"base": base})
        if parallel.offload == "none":
            yield _suggest(0, parallel={"base": "paged", "resident_bytes": 0})
    if parallel.prefetch:
        yield _suggest(0, parallel={"prefetch": 0})
    if optim.name.endswith("32bit") or optim.name == "adamw":
        yield _suggest(0, optim={"name": "paged-adamw-32bit", "resident_bytes": 0})
    if model.embeddings != "4bit":
        yield _suggest(1, model={"embeddings": "4bit"})
    if not optim.name.endswith("8bit"):
        yield _suggest(1, optim={"name": "paged-adamw-8bit", "resident_bytes": 0})
    for part in (2, 4, 8):
        yield _suggest(2, data={"seq_len": max(1, config.data.seq_len // part)})
        yield _suggest(2, lora={"r": max(1, config.lora.r // part)})


def _suggest(harm: int, **sections: Mapping[str, Any]) -> Suggestion:
    return Suggestion(harm, sections)


def _predict_suggestion(
    setup: RunSetup, change: Suggestion, available_bytes: int, known: RankSpeeds
) -> tuple[int, float]:
    """Bytes at the peak, and tokens/s; the latter only to be compared."""
    run = planned_run(setup, apply_changes(setup.config, change.sections))
    memory = _plan_memory(run, setup, available_bytes)
    return memory.peak_bytes, estimate_step_time(run, memory, known).tokens_per_s


def combine_suggestions(
    setup: RunSetup, single: list[tuple[Suggestion, int, float]], limit: int, available_bytes: int
) -> tuple[str, int]:
    """Changes that leave the training what it is, one on top of the other, until they are enough.

    Returns:
        Them, and bytes at the peak.
    """
    config, least, settings = setup.config, sys.maxsize, dict[str, Any]()
    for change, _, _ in sorted((s for s in single if s[0].severity < 2), key=lambda s: (s[0].severity, -s[2])):
        tried = apply_changes(config, change.sections)
        peak = _plan_memory(planned_run(setup, tried), setup, available_bytes).peak_bytes
        if peak < least:
            config, least = tried, peak
            settings |= {
                f"{section}.{key}": v for section, values in change.sections.items() for key, v in values.items()
            }
        if least <= limit:
            break
    return " ".join(f"{key}={value}" for key, value in settings.items()), least


def _plan_memory(run: RunSpec, setup: RunSetup, had: int) -> MemoryEstimate:
    """Paged moments make room; they are not what was too much."""
    return estimate_memory(run, had + CUDA_CONTEXT_BYTES if setup.device.type == "cuda" else None)


def _reference_speeds(run: RunSpec) -> RankSpeeds:
    """Of a device that nobody knows: enough to say what is quicker."""
    hardware = load_hardware()
    gpu = hardware.gpu("a100-80gb")
    return data_sheet_speeds(run, gpu, hardware.link(gpu.link), hardware.link("infiniband-400g"))


def _available_bytes(setup: RunSetup, message: str, before: int) -> int:
    """Bytes that the device had for tensors, as far as that has been seen."""
    if setup.device.type == "cuda":  # not run on a GPU
        return torch.cuda.mem_get_info(setup.device)[0] + torch.cuda.memory_reserved(setup.device)
    held = peak_memory_bytes(setup.device) - before
    free = free_memory_bytes(setup.device, setup.ranks.local_world_size)
    match = re.search(r"tried to allocate (\d+) bytes", message)
    requested_bytes = int(match[1]) if match else 0
    return held + free if requested_bytes > free else held  # else some other limit is in force, and was met about there
