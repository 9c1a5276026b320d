"""The split of a step's time into kinds of work: `run.profile` runs the last step under torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from qlora_dist.runtime.device_memory import peak_memory_bytes

STEP_KINDS = ("compute", "dequantization", "communication", "paging", "data", "optimizer")
"""Kinds of work that a step is split into. compute is the rest, including Python."""

TimeSpan = tuple[float, float]
"""Begin and end in nanoseconds."""

# our labels, for places that no library labels
DATA_LABEL, STEP_LABEL, OPTIMIZER_LABEL, PAGE_LABEL, WAIT_LABEL = (
    f"qlora_dist::{name}" for name in ("data", "step", "optimizer", "page", "wait")
)
_COLLECTIVE_PREFIXES = ("FSDP::", "c10d::", "gloo:", "nccl:", WAIT_LABEL)
"""Prefixes of events that are communication. FSDP2's labels include its copies and its waiting."""
_LABEL_PREFIXES = ("FSDP::", "c10d::", "qlora_dist::")
"""Prefixes of labels that the profiler also shows on a GPU, for as long as their kernels run."""


class StepProfiler:
    """Profile of one step on this rank, and the peak memory before it, because profiling itself takes memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: ExitStack | None = None
        self._profile: profile | None = None
        self.peak_bytes = 0

    def begin(self) -> None:
        """Start profiling, before the step. Further calls have no effect."""
        if self._running is not None:
            return
        self.peak_bytes = peak_memory_bytes(self._device)
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._running = ExitStack()
        self._running.callback(setattr, dist.Work, "wait", dist.Work.wait)
        dist.Work.wait = _label_wait(dist.Work.wait)  # type: ignore[method-assign]  # replaced on purpose, until `end`
        self._profile = self._running.enter_context(profile(activities=activities))

    def end(self) -> dict[str, float]:
        """Stop profiling, and return the share of each of `STEP_KINDS` in the step; empty if no step was profiled."""
        if self._running is None:
            return {}
        self._running.close()
        assert self._profile is not None and self._profile.profiler is not None
        results = self._profile.profiler.kineto_results
        assert results is not None
        return compute_step_shares(results.events())


def compute_step_shares(events: Iterable[Any]) -> dict[str, float]:
    """Split the time of the last step among raw events of torch's profiler, whose Python list takes a minute to build.

    On a CPU the time of the training thread is split. With CUDA (not run on a GPU) the device's time is split. There,
    computation counts before a concurrent collective, and idle time counts as the work that the host waits for.
    """
    on_host, on_device = _group_events(events)
    ((step, thread),) = on_host.pop(STEP_LABEL)[-1:]
    host_spans = {name: [span for span, other in spans if other == thread] for name, spans in on_host.items()}
    begin, end = host_spans[DATA_LABEL][-1][0], step[1]
    paging, reading = host_spans.get(PAGE_LABEL, []), host_spans[DATA_LABEL]
    if not on_device:
        layers = {
            "paging": paging,
            "data": reading,
            "dequantization": _select_spans(host_spans, lambda name: "dequantize" in name),
            "communication": _select_spans(host_spans, lambda name: name.startswith(_COLLECTIVE_PREFIXES)),
            "optimizer": host_spans.get(OPTIMIZER_LABEL, []),
        }
        return split_time(layers, begin, end)
    device = {name: [span for span, _ in spans] for name, spans in on_device.items()}
    optimizer = device.pop(OPTIMIZER_LABEL, [])  # the label lasts as long as its kernels run
    layers = {
        "dequantization": _select_spans(device, lambda name: "dequant" in name.lower()),
        "optimizer": optimizer,
        "compute": _select_spans(
            device, lambda name: "nccl" not in name.lower() and not name.startswith(_LABEL_PREFIXES)
        ),
        "communication": _select_spans(
            device, lambda name: "nccl" in name.lower() and not name.startswith(_LABEL_PREFIXES)
        ),
        "paging": paging,
        "data": reading,
    }
    return split_time(layers, begin, max([end, *(last for _, last in optimizer)]))


def _group_events(
    events: Iterable[Any],
) -> tuple[dict[str, list[tuple[TimeSpan, int]]], dict[str, list[tuple[TimeSpan, int]]]]:
    """Return time span and thread of each event by name, on the host and on the device."""
    on_host: dict[str, list[tuple[TimeSpan, int]]] = {}
    on_device: dict[str, list[tuple[TimeSpan, int]]] = {}
    for event in events:
        start = event.start_ns()
        spans = on_host if event.device_type() == DeviceType.CPU else on_device
        span = (start, start + event.duration_ns())
        spans.setdefault(event.name(), []).append((span, event.start_thread_id()))
    return on_host, on_device


def _select_spans(spans: dict[str, list[TimeSpan]], predicate: Callable[[str], bool]) -> list[TimeSpan]:
    return [span for name, named in spans.items() if predicate(name) for span in named]


def split_time(layers: dict[str, list[TimeSpan]], begin: float, end: float) -> dict[str, float]:
    """Return the share of each kind in the time from `begin` to `end`.

    Where several kinds overlap, the first in `layers` counts. The rest is compute.
    """
    shares = dict.fromkeys(STEP_KINDS, 0.0)
    taken: list[TimeSpan] = []
    covered = 0.0
    for kind, spans in layers.items():
        inside = [(max(a, begin), min(b, end)) for a, b in spans if a < end and b > begin]
        taken = merge_spans([*taken, *inside])
        total = sum(b - a for a, b in taken)
        shares[kind] += (total - covered) / (end - begin)
        covered = total
    shares["compute"] += 1.0 - covered / (end - begin)
    return shares


def merge_spans(spans: Sequence[TimeSpan]) -> list[TimeSpan]:
    """Return spans that cover the same times, in order and without overlaps."""
    merged: list[TimeSpan] = []
    for a, b in sorted(spans):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged


def _label_wait(wait: Any) -> Any:
    """Label the waiting for a collective. Torch labels only when a collective is issued and when it runs."""

    def labeled_wait(self: Any, *args: Any, **options: Any) -> Any:
        with record_function(WAIT_LABEL):
            return wait(self, *args, **options)

    return labeled_wait
