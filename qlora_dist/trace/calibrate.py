"""`qlora-dist plan --calibrate`: speeds of this machine, measured on every rank at the same time."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from qlora_dist.doctor.cross_node_checks import check_bandwidth, median_seconds
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quantize import dequantize_weight
from qlora_dist.plan.calibration_file import MeasuredSpeeds, save_calibration
from qlora_dist.plan.hardware import load_hardware
from qlora_dist.runtime.environment import RankInfo, read_rank_info
from qlora_dist.runtime.object_collectives import all_gather_json
from qlora_dist.runtime.process_group import process_group, resolve_device

_MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the square matrices that are multiplied."""
_COPY_BYTES = {"cuda": 2**28, "cpu": 2**26}


def calibrate(path: Path | None, console: Console) -> None:
    """Measure this machine's speeds, and write them to `path` or the user's file. Call it on every rank."""
    ranks = read_rank_info()
    device = resolve_device("auto", ranks)
    with process_group(ranks, device):
        measured = measure_speeds(ranks, device)
        if ranks.rank == 0:
            kind = "cpu" if device.type == "cpu" else load_hardware().find_gpu_name(measured.device) or measured.device
            file = save_calibration(kind, measured, path)
            for name, value in measured.model_dump(exclude_none=True).items():
                console.print(f"{name}: {value if isinstance(value, str) else f'{value:.3g} /s'}", markup=False)
            console.print(f"saved as {kind} in {file}", markup=False)


def measure_speeds(ranks: RankInfo, device: torch.device) -> MeasuredSpeeds:
    """Return the speeds of the slowest rank. Matrix products and dequantization are in bf16, as in training."""
    side, nbytes = _MATRIX_SIDE[device.type], _COPY_BYTES[device.type]
    x = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    product = _slowest_rank_seconds(lambda: x @ x, device)
    layout = NF4Layout(shape=(side, side))
    packed = torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device)
    dequantized = _slowest_rank_seconds(lambda: dequantize_weight(packed, layout, torch.bfloat16), device)
    device_buffer = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    streamed = _slowest_rank_seconds(lambda: device_buffer.view(torch.bfloat16).mul_(1.0), device)
    host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    copied = _slowest_rank_seconds(lambda: device_buffer.copy_(host), device)
    nodes = ranks.world_size // ranks.local_world_size
    bandwidths = _bandwidths(ranks, device) if ranks.world_size > 1 else {}
    intra_node = inter_node = None
    if ranks.local_world_size > 1:
        intra_node = bandwidths.get("bandwidth node" if nodes > 1 else "bandwidth world")
    if nodes > 1:
        inter_node = bandwidths["bandwidth across" if ranks.local_world_size > 1 else "bandwidth world"]
    return MeasuredSpeeds(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        torch=torch.__version__,
        flops=2 * side**3 / product,
        dequantized_bytes=(layout.total_bytes + 2 * side**2) / dequantized,
        streamed_bytes=2 * nbytes / streamed,
        host_bytes=nbytes / copied,
        inside_bytes=intra_node,
        between_bytes=inter_node * ranks.local_world_size if inter_node else None,
    )


def _bandwidths(ranks: RankInfo, device: torch.device) -> dict[str, float]:
    """Return the bytes per second that a rank receives in an all-gather, by the doctor's checks."""
    return {f.check: f.values["all_gather_bytes_per_s"] for f in check_bandwidth(ranks, device) if f.values is not None}


def _slowest_rank_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of five calls on the slowest rank."""
    call()
    slowest: float = max(all_gather_json(median_seconds(call, device)))
    return slowest
