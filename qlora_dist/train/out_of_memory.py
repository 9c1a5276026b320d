"""Out-of-memory errors as sentences that name settings which fit, by the planner's formulas."""

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
"""Number of alternative settings in the message."""


@dataclass(frozen=True)
class Suggestion:
    """Change of the configuration that needs less memory."""

    severity: int
    """0: changes only rounding; 1: uses fewer bits; 2: changes the training result."""
    changes: ConfigChanges
    """Changed values by section and key."""

    @property
    def overrides(self) -> str:
        """Overrides for the command line."""
        return " ".join(f"{section}.{key}={v}" for section, values in self.changes.items() for key, v in values.items())


@contextmanager
def explain_out_of_memory(setup: RunSetup) -> Iterator[None]:
    """Replace an out-of-memory error of this rank by a UserError that names settings to change.

    It is local, so the other ranks stop with the same sentence.
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
    """Return whether an error comes from an allocator of torch or from Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator: " in str(error) or "CUDA out of memory" in str(error)


def out_of_memory_message(setup: RunSetup, message: str, initial_resident_bytes: int) -> str:
    """Return the sentence that replaces an error with this message. The resident bytes are from before loading."""
    available_bytes = _available_bytes(setup, message, initial_resident_bytes)
    beginning = f"out of memory: the rank had {format_bytes(available_bytes)} for tensors"
    try:
        run = planned_run(setup, setup.config)
        memory = _plan_memory(run, setup, available_bytes)
        # allocators reserve more than is asked for
        limit = int(min(available_bytes, memory.peak_bytes) / RESERVED_RATIOS[1])
        device_speed = device_speeds(setup.device, run)[0] or _reference_speeds(run)
        single = [
            (suggestion, *_predict_suggestion(setup, suggestion, available_bytes, device_speed))
            for suggestion in iter_suggestions(setup)
        ]
    except Exception as error:  # the planner may lack formulas for the model
        return f"{beginning}, and there is no plan of what it needs ({error}); lower train.micro_batch or data.seq_len"
    more_bytes = memory.peak_bytes - memory.static_bytes
    needs = (
        f"{beginning} and needs {format_bytes(memory.peak_bytes)} by its plan, {format_bytes(memory.static_bytes)} "
        f"between steps and {format_bytes(more_bytes)} more {PHASE_LABELS[memory.peak_phase]}"
    )
    fitting: dict[str, tuple[int, float, str]] = {}
    for suggestion, peak, rate in single:
        if peak <= limit:  # among several values of one key, take the first
            fitting.setdefault(
                suggestion.overrides.partition("=")[0],
                (suggestion.severity, -rate, f"{suggestion.overrides} ({format_bytes(peak)})"),
            )
    if fitting:
        return f"{needs}; set {', or '.join(text for _, _, text in sorted(fitting.values())[:_MAX_SUGGESTIONS])}"
    settings, peak = combine_suggestions(setup, single, limit, available_bytes)
    if peak <= limit:
        return f"{needs}; set {settings} ({format_bytes(peak)}), all of them"
    return f"{needs}; no setting is enough (with {settings} {format_bytes(peak)}), so take more ranks"


def iter_suggestions(setup: RunSetup) -> Iterator[Suggestion]:
    """Yield single changes that need less memory."""
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
        ranks_by_base = {"node": setup.ranks.local_world_size, "world": world}
        for base, count in ranks_by_base.items():
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


def _suggest(severity: int, **changes: Mapping[str, Any]) -> Suggestion:
    return Suggestion(severity, changes)


def _predict_suggestion(
    setup: RunSetup, suggestion: Suggestion, available_bytes: int, device_speed: RankSpeeds
) -> tuple[int, float]:
    """Return the peak bytes and the tokens/s, which serve only to compare changes."""
    run = planned_run(setup, apply_changes(setup.config, suggestion.changes))
    memory = _plan_memory(run, setup, available_bytes)
    return memory.peak_bytes, estimate_step_time(run, memory, device_speed).tokens_per_s


def combine_suggestions(
    setup: RunSetup, single: list[tuple[Suggestion, int, float]], limit: int, available_bytes: int
) -> tuple[str, int]:
    """Combine changes that keep the training result, until they are enough. Return the overrides and the peak bytes."""
    config, least, settings = setup.config, sys.maxsize, dict[str, Any]()
    for suggestion, _, _ in sorted((s for s in single if s[0].severity < 2), key=lambda s: (s[0].severity, -s[2])):
        tried = apply_changes(config, suggestion.changes)
        peak = _plan_memory(planned_run(setup, tried), setup, available_bytes).peak_bytes
        if peak < least:
            config, least = tried, peak
            settings |= {
                f"{section}.{key}": v for section, values in suggestion.changes.items() for key, v in values.items()
            }
        if least <= limit:
            break
    return " ".join(f"{key}={value}" for key, value in settings.items()), least


def _plan_memory(run: RunSpec, setup: RunSetup, available_bytes: int) -> MemoryEstimate:
    """Return the memory estimate. Paged optimizer states shrink as needed, so they did not cause the error."""
    return estimate_memory(run, available_bytes + CUDA_CONTEXT_BYTES if setup.device.type == "cuda" else None)


def _reference_speeds(run: RunSpec) -> RankSpeeds:
    """Return speeds that stand in for an unknown device, because they only rank the changes."""
    hardware = load_hardware()
    gpu = hardware.gpu("a100-80gb")
    return data_sheet_speeds(run, gpu, hardware.link(gpu.link), hardware.link("infiniband-400g"))


def _available_bytes(setup: RunSetup, message: str, initial_resident_bytes: int) -> int:
    """Return the bytes that the device had for tensors, as far as they were observed."""
    if setup.device.type == "cuda":  # not run on a GPU
        return torch.cuda.mem_get_info(setup.device)[0] + torch.cuda.memory_reserved(setup.device)
    held = peak_memory_bytes(setup.device) - initial_resident_bytes
    free = free_memory_bytes(setup.device, setup.ranks.local_world_size)
    match = re.search(r"tried to allocate (\d+) bytes", message)
    requested_bytes = int(match[1]) if match else 0
    # otherwise some other limit applies, and the process reached it at about `held`
    return held + free if requested_bytes > free else held
