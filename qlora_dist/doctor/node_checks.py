"""Checks that a node does by itself."""

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
from qlora_dist.nf4.code_tables import code_table, nested_code_table
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quantize import dequantize_weight, quantize_weight
from qlora_dist.runtime.bf16_support import bf16_warning
from qlora_dist.runtime.environment import RankInfo, master_addr
from qlora_dist.runtime.network import resolve_error
from qlora_dist.runtime.system import usable_cpu_count

_MIN_FREE_DISK_BYTES = 10 * 2**30
_GIB = 2**30


def check_node(ranks: RankInfo, device: torch.device, folder: Path) -> list[Finding]:
    """All of them, always in the same order.

    Args:
        ranks: who this process is.
        device: of this rank.
        folder: where runs go.
    """
    on_device = [check_free_memory(device), check_compute_type(device), check_dequantize_kernel(device)]
    return [check_libraries(), check_devices(ranks), *on_device, check_free_disk(folder), check_own_host_name()]


def check_libraries() -> Finding:
    """The installed versions against those that the tests were run with."""
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
        return Finding("libraries", "fail", f"{python}, without {', '.join(missing)}", "pip install qlora-dist")
    if others:
        remedy = "if something is odd, install the tested ones (constraints.txt)"
        return Finding("libraries", "warn", f"{python}, {', '.join(others)}", remedy)
    return Finding("libraries", "ok", f"{python}, and {len(TESTED_VERSIONS)} libraries in the tested versions")


def check_devices(ranks: RankInfo) -> Finding:
    """One GPU for each rank of the node (with GPUs: not run)."""
    own, num_ranks = usable_cpu_count(), ranks.local_world_size
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (torch is built without CUDA)"
        said = f"no CUDA device{built}; {num_ranks} {_plural(num_ranks, 'rank')} on {own} {_plural(own, 'core')}"
        return Finding("devices", "warn", said, "fine for trying; for GPUs, install torch with CUDA, and the driver")
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    said = f"{count} x {', '.join(names)}; {num_ranks} {_plural(num_ranks, 'rank')}, {own} {_plural(own, 'core')}"
    if count < num_ranks and count != 1:  # with one for each rank (--gpus-per-task=1) a rank sees its own only
        return Finding("devices", "fail", said, f"start {count} ranks on this node")
    return Finding("devices", "ok", said)


def check_free_memory(device: torch.device) -> Finding:
    """What is free: of the GPU (not run), or of the system."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.free, memory.total
    values = {"free_bytes": free, "total_bytes": total}
    said = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB are free" + (" on the GPU" if device.type == "cuda" else "")
    if device.type == "cuda" and free < 0.9 * total:
        return Finding("memory", "warn", said, "see with nvidia-smi who else uses the GPU", values)
    return Finding("memory", "ok", said, values=values)


def check_compute_type(device: torch.device) -> Finding:
    """Look for bf16 instructions: bf16 is the default of `model.compute_dtype`."""
    warning = bf16_warning(device)
    if warning is None:
        return Finding("compute type", "ok", f"bf16, the default, on {device.type}")
    said, _, remedy = warning.rpartition("; ")
    return Finding("compute type", "warn", said, remedy)


def check_dequantize_kernel(device: torch.device) -> Finding:
    """A matrix dequantized by the kernels of bitsandbytes, and by looking it up in the tables."""
    generator = torch.Generator().manual_seed(0)
    try:
        packed, layout = quantize_weight(torch.randn(96, 80, generator=generator).to(device))
        dequantized = dequantize_weight(packed, layout, torch.float32).cpu()
    except (RuntimeError, OSError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        return Finding("kernels", "fail", f"bitsandbytes on {device.type}: {reason}", "reinstall bitsandbytes")
    expected = _dequantize_by_table(packed.cpu(), layout)
    if not torch.equal(dequantized, expected):
        worst = float((dequantized - expected).abs().max())
        version = metadata.version("bitsandbytes")
        said = f"bitsandbytes {version} dequantizes wrongly on {device.type}, by up to {worst:.3g}"
        return Finding("kernels", "fail", said, "install another version of bitsandbytes (constraints.txt)")
    return Finding("kernels", "ok", f"bitsandbytes dequantizes on {device.type} to the last bit")


def check_free_disk(folder: Path) -> Finding:
    """Room where runs go."""
    existing = nearest_existing_folder(folder)
    if not os.access(existing, os.W_OK):
        return Finding("disk", "fail", f"{existing} cannot be written", "name another folder in run.dir")
    free = shutil.disk_usage(existing).free
    said, values = f"{free / _GIB:.0f} GiB are free in {existing}", {"free_bytes": free}
    if free < _MIN_FREE_DISK_BYTES:
        return Finding("disk", "warn", said, "checkpoints need twelve bytes for each trained parameter", values)
    return Finding("disk", "ok", said, values=values)


def check_own_host_name(environ: Mapping[str, str] = os.environ) -> Finding:
    """Names by which ranks meet: this machine's own, which torchrun takes, and the one in MASTER_ADDR."""
    own, master = socket.gethostname(), master_addr(environ)
    if master and (reason := resolve_error(master)) is not None:
        remedy = "set MASTER_ADDR to an address of rank 0's machine, or add the name to the DNS or to /etc/hosts"
        return Finding("host name", "fail", f"MASTER_ADDR: {master} leads nowhere ({reason})", remedy)
    if (reason := resolve_error(own)) is not None:
        remedy = "add it to /etc/hosts; on one machine, start torchrun with --local-addr 127.0.0.1, as launch does"
        return Finding("host name", "warn", f"{own}, this machine's own name, leads nowhere ({reason})", remedy)
    return Finding("host name", "ok", f"{own} is known here")


def nearest_existing_folder(folder: Path) -> Path:
    """It, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _dequantize_by_table(packed: torch.Tensor, layout: NF4Layout) -> torch.Tensor:
    """By tables alone: two codes a byte, the first in the high half; QLoRA, section 3."""
    codes = torch.stack([packed[layout.codes] >> 4, packed[layout.codes] & 15], dim=1).flatten()[: layout.numel]
    scales = packed[layout.nested_absmax].view(torch.float32)
    quantized = packed[layout.absmax].int()
    nested = nested_code_table(torch.device("cpu"))[quantized] * scales[torch.arange(len(quantized)) // 256]
    absmax = nested + packed[layout.offset].view(torch.float32)
    blocks = torch.arange(layout.numel) // layout.block_size
    return (code_table("nf4")[codes.int()] * absmax[blocks]).view(layout.shape)


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"
