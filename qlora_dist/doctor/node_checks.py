"""Checks of a single node."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import psutil
import torch

from qlora_dist.compat.versions import TESTED_VERSIONS
from qlora_dist.doctor.finding import Finding
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quantize import code_table, dequantize_weight, nested_code_table, quantize_weight
from qlora_dist.runtime.environment import RankInfo, master_addr
from qlora_dist.runtime.network import resolve_error
from qlora_dist.runtime.process_group import bf16_warning
from qlora_dist.runtime.system import usable_cpu_count

_MIN_FREE_DISK_BYTES = 10 * 2**30
_GIB = 2**30


def check_node(ranks: RankInfo, device: torch.device, folder: Path) -> list[Finding]:
    """Run all checks of this node, in a fixed order. `folder` is the folder of all runs."""
    on_device = [check_free_memory(device), check_compute_type(device), check_dequantize_kernel(device)]
    return [check_libraries(), check_devices(ranks), *on_device, check_free_disk(folder), check_own_host_name()]


def check_libraries() -> Finding:
    """Compare the installed versions of libraries with the tested ones."""
    others, missing = [], []
    for package, tested in TESTED_VERSIONS.items():
        try:
            installed = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(package)
            continue
        if installed != tested:
            others.append(f"{package} {installed} (tested: {tested})")
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if missing:
        return Finding(
            "libraries", "fail", said=f"{python}, without {', '.join(missing)}", remedy="pip install qlora-dist"
        )
    if others:
        remedy = "if something is odd, install the tested ones (constraints.txt)"
        return Finding("libraries", "warn", said=f"{python}, {', '.join(others)}", remedy=remedy)
    return Finding("libraries", "ok", said=f"{python}, and {len(TESTED_VERSIONS)} libraries in the tested versions")


def check_devices(ranks: RankInfo) -> Finding:
    """Check that each rank of the node has a GPU (not run with GPUs)."""
    own, num_ranks = usable_cpu_count(), ranks.local_world_size
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (torch is built without CUDA)"
        message = f"no CUDA device{built}; {num_ranks} {_plural(num_ranks, 'rank')} on {own} {_plural(own, 'core')}"
        remedy = "fine for trying; for GPUs, install torch with CUDA, and the driver"
        return Finding("devices", "warn", said=message, remedy=remedy)
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    message = f"{count} x {', '.join(names)}; {num_ranks} {_plural(num_ranks, 'rank')}, {own} {_plural(own, 'core')}"
    if count < num_ranks and count != 1:  # with --gpus-per-task=1 a rank sees only its own GPU
        return Finding("devices", "fail", said=message, remedy=f"start {count} ranks on this node")
    return Finding("devices", "ok", said=message)


def check_free_memory(device: torch.device) -> Finding:
    """Check the free memory of the GPU (not run), or of the system."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.free, memory.total
    values = {"free_bytes": free, "total_bytes": total}
    message = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB are free" + (" on the GPU" if device.type == "cuda" else "")
    if device.type == "cuda" and free < 0.9 * total:
        remedy = "see with nvidia-smi who else uses the GPU"
        return Finding("memory", "warn", said=message, remedy=remedy, values=values)
    return Finding("memory", "ok", said=message, values=values)


def check_compute_type(device: torch.device) -> Finding:
    """Check for bf16 instructions, because bf16 is the default of `model.compute_dtype`."""
    warning = bf16_warning(device)
    if warning is None:
        return Finding("compute type", "ok", said=f"bf16, the default, on {device.type}")
    message, _, remedy = warning.rpartition("; ")
    return Finding("compute type", "warn", said=message, remedy=remedy)


def check_dequantize_kernel(device: torch.device) -> Finding:
    """Compare a matrix that bitsandbytes' kernels dequantize with the result of table lookups."""
    generator = torch.Generator().manual_seed(0)
    try:
        packed, layout = quantize_weight(torch.randn(96, 80, generator=generator).to(device))
        dequantized = dequantize_weight(packed, layout, torch.float32).cpu()
    except (RuntimeError, OSError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        message = f"bitsandbytes on {device.type}: {reason}"
        return Finding("kernels", "fail", said=message, remedy="reinstall bitsandbytes")
    expected = _dequantize_by_table(packed.cpu(), layout)
    if not torch.equal(dequantized, expected):
        worst = float((dequantized - expected).abs().max())
        version = metadata.version("bitsandbytes")
        message = f"bitsandbytes {version} dequantizes wrongly on {device.type}, by up to {worst:.3g}"
        remedy = "install another version of bitsandbytes (constraints.txt)"
        return Finding("kernels", "fail", said=message, remedy=remedy)
    return Finding("kernels", "ok", said=f"bitsandbytes dequantizes on {device.type} to the last bit")


def check_free_disk(folder: Path) -> Finding:
    existing = nearest_existing_folder(folder)
    if not os.access(existing, os.W_OK):
        return Finding("disk", "fail", said=f"{existing} cannot be written", remedy="name another folder in run.dir")
    free = shutil.disk_usage(existing).free
    message, values = f"{free / _GIB:.0f} GiB are free in {existing}", {"free_bytes": free}
    if free < _MIN_FREE_DISK_BYTES:
        remedy = "checkpoints need twelve bytes for each trained parameter"
        return Finding("disk", "warn", said=message, remedy=remedy, values=values)
    return Finding("disk", "ok", said=message, values=values)


def check_own_host_name(environ: Mapping[str, str] = os.environ) -> Finding:
    """Check the names used for the rendezvous: this machine's, which torchrun uses, and the one in MASTER_ADDR."""
    own, master = socket.gethostname(), master_addr(environ)
    if master and (reason := resolve_error(master)) is not None:
        remedy = "set MASTER_ADDR to an address of rank 0's machine, or add the name to the DNS or to /etc/hosts"
        return Finding("host name", "fail", said=f"MASTER_ADDR: {master} cannot be resolved ({reason})", remedy=remedy)
    if (reason := resolve_error(own)) is not None:
        remedy = "add it to /etc/hosts; on one machine, start torchrun with --local-addr 127.0.0.1, as launch does"
        message = f"{own}, this machine's own name, cannot be resolved ({reason})"
        return Finding("host name", "warn", said=message, remedy=remedy)
    return Finding("host name", "ok", said=f"{own} is known here")


def nearest_existing_folder(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _dequantize_by_table(packed: torch.Tensor, layout: NF4Layout) -> torch.Tensor:
    """Dequantize by table lookups (QLoRA, section 3). A byte holds two codes, the first in its high half."""
    codes = torch.stack([packed[layout.codes] >> 4, packed[layout.codes] & 15], dim=1).flatten()[: layout.numel]
    scales = packed[layout.nested_absmax].view(torch.float32)
    quantized = packed[layout.absmax].int()
    nested = nested_code_table(torch.device("cpu"))[quantized] * scales[torch.arange(len(quantized)) // 256]
    absmax = nested + packed[layout.offset].view(torch.float32)
    blocks = torch.arange(layout.numel) // layout.block_size
    return (code_table("nf4")[codes.int()] * absmax[blocks]).view(layout.shape)


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"
