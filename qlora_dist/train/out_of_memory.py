"""An out-of-memory error is answered with what would have fitted, in bytes, by the planner's formulas."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qlora_dist.config.config_file import Sections, changed
from qlora_dist.errors import UserError
from qlora_dist.plan.hardware import load_hardware
from qlora_dist.plan.memory_estimate import CONTEXT_BYTES, RESERVED, Memory, plan_memory
from qlora_dist.plan.print_plan import PHASES
from qlora_dist.plan.run_spec import Run
from qlora_dist.plan.step_time import Speeds, speeds, step_time
from qlora_dist.runtime.device_memory import free_bytes, peak_bytes, resident_bytes
from qlora_dist.train.console import gib
from qlora_dist.train.prediction import run_of, speeds_of
from qlora_dist.train.run_setup import Setup

_ANSWERS = 3


@dataclass(frozen=True)
class Change:
    """What could be set."""

    harm: int
    """0: what is computed stays the same but for rounding; 1: fewer bits; 2: it is another training."""
    sections: Sections

    @property
    def setting(self) -> str:
        """As the command line takes it."""
        return " ".join(
            f"{section}.{key}={v}" for section, values in self.sections.items() for key, v in values.items()
        )


@contextmanager
def answered(setup: Setup) -> Iterator[None]:
    """Turn an out-of-memory error of this rank into a sentence that says what to change.

    Raises:
        UserError: in its place. Of this rank alone: the others end with it.
    """
    before = resident_bytes()
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sentence = answer(setup, str(error), before)
        raise UserError(sentence, one_rank=True) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device's allocator, torch's for CPUs, or Python."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator: " in str(error) or "CUDA out of memory" in str(error)


def answer(setup: Setup, message: str, before: int) -> str:
    """What to say.

    Args:
        setup: of the run.
        message: of the error.
        before: resident bytes of the process before anything was loaded.
    """
    had = _had(setup, message, before)
    beginning = f"out of memory: the rank had {gib(had)} for tensors"
    try:
        run = run_of(setup, setup.config)
        memory = _memory(run, setup, had)
        limit = int(min(had, memory.peak_bytes) / RESERVED[1])  # allocators reserve more than is asked for
        known = speeds_of(setup.device, run)[0] or _some_speeds(run)
        single = [(change, *_planned(setup, change, had, known)) for change in changes(setup)]
    except Exception as error:  # the model is one that nobody has planned
        return f"{beginning}, and there is no plan of what it needs ({error}); lower train.micro_batch or data.seq_len"
    needs = (
        f"{beginning} and needs {gib(memory.peak_bytes)} by its plan, {gib(memory.static_bytes)} between steps and "
        f"{gib(memory.peak_bytes - memory.static_bytes)} more {PHASES[memory.peak_phase]}"
    )
    fitting: dict[str, tuple[int, float, str]] = {}
    for change, peak, rate in single:
        if peak <= limit:  # of several values of one key the first
            fitting.setdefault(
                change.setting.partition("=")[0], (change.harm, -rate, f"{change.setting} ({gib(peak)})")
            )
    if fitting:
        return f"{needs}; set {', or '.join(text for _, _, text in sorted(fitting.values())[:_ANSWERS])}"
    settings, least = together(setup, single, limit, had)
    if least <= limit:
        return f"{needs}; set {settings} ({gib(least)}), all of them"
    return f"{needs}; nothing that can be set is enough (with {settings} {gib(least)}), so take more ranks"


def changes(setup: Setup) -> Iterator[Change]:
    """What could be set to need less memory, each of them by itself."""
    config, world = setup.config, setup.ranks.world_size
    train, parallel, optim, model = config.train, config.parallel, config.optim, config.model
    if train.checkpointing != "full":
        yield _change(0, train={"checkpointing": "full"})
    micro_batch = train.micro_batch
    while micro_batch % 2 == 0:
        micro_batch //= 2
        yield _change(0, train={"micro_batch": micro_batch})
    if parallel.base != "paged":
        shards = setup.sizes.base_shards
        named = {"node": setup.ranks.local_world_size, "world": world}
        for base, count in named.items():
            if count > shards:
                yield _change(0, parallel={"base": base})
        if parallel.offload == "none":
            yield _change(0, parallel={"base": "paged", "resident_bytes": 0})
    if parallel.prefetch:
        yield _change(0, parallel={"prefetch": 0})
    if optim.name.endswith("32bit") or optim.name == "adamw":
        yield _change(0, optim={"name": "paged-adamw-32bit", "resident_bytes": 0})
    if model.embeddings != "4bit":
        yield _change(1, model={"embeddings": "4bit"})
    if not optim.name.endswith("8bit"):
        yield _change(1, optim={"name": "paged-adamw-8bit", "resident_bytes": 0})
    for part in (2, 4, 8):
        yield _change(2, data={"seq_len": max(1, config.data.seq_len // part)})
        yield _change(2, lora={"r": max(1, config.lora.r // part)})


def _change(harm: int, **sections: Mapping[str, Any]) -> Change:
    return Change(harm, sections)


def _planned(setup: Setup, change: Change, had: int, known: Speeds) -> tuple[int, float]:
    """Bytes at the peak, and tokens/s; the latter only to be compared."""
    run = run_of(setup, changed(setup.config, change.sections))
    memory = _memory(run, setup, had)
    return memory.peak_bytes, step_time(run, memory, known).tokens_per_s


def together(setup: Setup, single: list[tuple[Change, int, float]], limit: int, had: int) -> tuple[str, int]:
    """Changes that leave the training what it is, one on top of the other, until they are enough.

    Returns:
        Them, and bytes at the peak.
    """
    config, least, settings = setup.config, sys.maxsize, dict[str, Any]()
    for change, _, _ in sorted((s for s in single if s[0].harm < 2), key=lambda s: (s[0].harm, -s[2])):
        tried = changed(config, change.sections)
        peak = _memory(run_of(setup, tried), setup, had).peak_bytes
        if peak < least:
            config, least = tried, peak
            settings |= {
                f"{section}.{key}": v for section, values in change.sections.items() for key, v in values.items()
            }
        if least <= limit:
            break
    return " ".join(f"{key}={value}" for key, value in settings.items()), least


def _memory(run: Run, setup: Setup, had: int) -> Memory:
    """Paged moments make room; they are not what was too much."""
    return plan_memory(run, had + CONTEXT_BYTES if setup.device.type == "cuda" else None)


def _some_speeds(run: Run) -> Speeds:
    """Of a device that nobody knows: enough to say what is quicker."""
    hardware = load_hardware()
    gpu = hardware.gpu("a100-80gb")
    return speeds(run, gpu, hardware.link(gpu.link), hardware.link("infiniband-400g"))


def _had(setup: Setup, message: str, before: int) -> int:
    """Bytes that the device had for tensors, as far as that has been seen."""
    if setup.device.type == "cuda":  # not run on a GPU
        return torch.cuda.mem_get_info(setup.device)[0] + torch.cuda.memory_reserved(setup.device)
    held = peak_bytes(setup.device) - before
    free = free_bytes(setup.device, setup.ranks.local_world_size)
    match = re.search(r"tried to allocate (\d+) bytes", message)
    asked = int(match[1]) if match else 0
    return held + free if asked > free else held  # else some other limit is in force, and was met about there
