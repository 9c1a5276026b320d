"""What a step's time goes into: `run.profile` has the last step run under torch's profiler."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from qlora_dist.train.memory import peak_bytes

KINDS = ("compute", "dequantization", "communication", "paging", "data", "optimizer")
"""What a step is split into. compute is what is left over, Python among it."""

Span = tuple[float, float]
"""Begin and end."""

# ours, where nobody else marks the place
DATA, STEP, OPTIMIZER, PAGE, WAIT = (f"qlora_dist::{name}" for name in ("data", "step", "optimizer", "page", "wait"))
_COLLECTIVES = ("FSDP::", "c10d::", "gloo:", "nccl:", WAIT)
"""FSDP2's own marks hold its collectives, their copies and its waiting for them."""


class LastStep:
    """The profile of one step on this rank, and its peak of memory before it: profiles take memory.

    Args:
        device: of the rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: ExitStack | None = None
        self._profile: profile | None = None
        self.peak_bytes = 0

    def begin(self) -> None:
        """Before the step; once is enough."""
        if self._running is not None:
            return
        self.peak_bytes = peak_bytes(self._device)
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._running = ExitStack()
        self._running.callback(setattr, dist.Work, "wait", dist.Work.wait)
        dist.Work.wait = _marked(dist.Work.wait)
        self._profile = self._running.enter_context(profile(activities=activities, acc_events=True))

    def end(self) -> dict[str, float]:
        """Afterwards: of each of `KINDS` its share of the step, together 1. Empty, if there was no step."""
        if self._running is None:
            return {}
        self._running.close()
        assert self._profile is not None
        return shares_of(self._profile.events())


def shares_of(events: Sequence[Any]) -> dict[str, float]:
    """Split the last step among some events.

    On a CPU the time of the thread that trains is split. With CUDA (not run on a GPU) the device's: what computes
    counts before a collective beside it, and while the device has nothing to do, what the host waits for.

    Args:
        events: of torch's profiler.
    """
    step = [event for event in events if event.name == STEP and not _on_device(event)][-1]
    host = [event for event in events if event.thread == step.thread and not _on_device(event)]
    device = [event for event in events if _on_device(event)]
    data = [event for event in host if event.name == DATA][-1]
    paging, reading = _spans(host, PAGE), _spans(host, DATA)
    if not device:
        layers = {
            "paging": paging,
            "data": reading,
            "dequantization": [_span(event) for event in host if "dequantize" in event.name],
            "communication": [_span(event) for event in host if event.name.startswith(_COLLECTIVES)],
            "optimizer": _spans(host, OPTIMIZER),
        }
        return split(layers, data.time_range.start, step.time_range.end)
    collective = [event for event in device if "nccl" in event.name.lower()]
    kernels = [event for event in device if not event.is_user_annotation and event not in collective]
    optimizer = _spans(device, OPTIMIZER)
    layers = {
        "dequantization": [_span(event) for event in kernels if "dequant" in event.name.lower()],
        "optimizer": optimizer,
        "compute": [_span(event) for event in kernels],
        "communication": [_span(event) for event in collective],
        "paging": paging,
        "data": reading,
    }
    return split(layers, data.time_range.start, max(step.time_range.end, *(end for _, end in optimizer), 0.0))


def split(layers: dict[str, list[Span]], begin: float, end: float) -> dict[str, float]:
    """Shares of the time from `begin` to `end`.

    Args:
        layers: of each kind, when it was at work; where several were, the first counts. What is in none is compute.
        begin: of the whole.
        end: of the whole.
    """
    shares = dict.fromkeys(KINDS, 0.0)
    taken: list[Span] = []
    covered = 0.0
    for kind, spans in layers.items():
        inside = [(max(a, begin), min(b, end)) for a, b in spans if a < end and b > begin]
        taken = merged([*taken, *inside])
        total = sum(b - a for a, b in taken)
        shares[kind] += (total - covered) / (end - begin)
        covered = total
    shares["compute"] += 1.0 - covered / (end - begin)
    return shares


def merged(spans: Sequence[Span]) -> list[Span]:
    """The same times, in order and without overlaps."""
    out: list[Span] = []
    for a, b in sorted(spans):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(b, out[-1][1]))
        else:
            out.append((a, b))
    return out


def _marked(wait: Any) -> Any:
    """Torch marks when a collective is issued and when it runs, not that somebody waits for it."""

    def marked_wait(self: Any, *args: Any, **options: Any) -> Any:
        with record_function(WAIT):
            return wait(self, *args, **options)

    return marked_wait


def _spans(events: Sequence[Any], name: str) -> list[Span]:
    return [_span(event) for event in events if event.name == name]


def _span(event: Any) -> Span:
    return event.time_range.start, event.time_range.end


def _on_device(event: Any) -> bool:
    return event.device_type != torch.autograd.DeviceType.CPU
