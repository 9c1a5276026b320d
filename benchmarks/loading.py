"""Loading a 4-bit folder on several ranks: bytes read, peak memory and seconds, and transformers' loader beside it.

python benchmarks/loading.py [--layers 19] [--ranks 4] [--dir /tmp] [--cold] [--repeats 1]

The folder has Llama-3.1-8B's layers (0.11 GB each in 4 bit) and random codes; it is removed afterwards. The ranks are
processes of this machine with gloo and one thread each, and load by the code of `train`: skeleton, adapter, sharding,
fill. Once with one copy of the base (base: world), once with two, as on two nodes (base: node). Then one process loads
the same folder with AutoModelForCausalLM.from_pretrained, and touches every page of the weights: without that they are
mapped and not yet read.

Bytes are those asked of the files; transformers maps the file, and has touched all of it in the end. Peak is the most
that was resident, beyond what was before the weights came (VmHWM, restarted): the page cache is not in it, but where
files are mapped their pages are. The limit is what the rank holds afterwards, the largest tensor of the folder, and 64
MiB. Waiting is the share of the time in which there was nothing to do but wait for a read. --cold takes the folder out
of the page cache before each loading.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from synthetic import drop_from_page_cache, resident_bytes, restart_peak, write_nf4

from qlora_dist.adapters.attach import attach_adapter, peft_config
from qlora_dist.config import Config
from qlora_dist.launch.environment import ranks_from_environment
from qlora_dist.model.fill import fill
from qlora_dist.model.folder import ModelFolder
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.nf4.read_ahead import Reading
from qlora_dist.parallel.fsdp import parallelize
from qlora_dist.parallel.mesh import build_meshes, mesh_sizes
from qlora_dist.parallel.process_group import process_group
from qlora_dist.parallel.static_bytes import check_static_bytes

MIB = 2**20
THEIRS = """
import sys, time
sys.path.insert(0, sys.argv[2])
import torch, transformers
from synthetic import resident_bytes, restart_peak
before, started = restart_peak(), time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cpu")
for parameter in model.parameters():
    parameter.data.view(-1).view(torch.uint8)[::4096].sum()
print(resident_bytes("VmHWM") - before, resident_bytes() - before, time.perf_counter() - started)
"""


def load(rank: int, world_size: int, nodes: int, port: int, folder: Path, pipe: Any) -> None:
    """What `train` does up to the first step, on one rank."""
    local = world_size // nodes
    variables = (rank, world_size, rank % local, local, "127.0.0.1", port)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update({name: str(value) for name, value in zip(names, variables, strict=True)})
    torch.set_num_threads(1)
    base = "world" if nodes == 1 else "node"
    config = Config.model_validate(
        {"model": {"base": str(folder)}, "lora": {"r": 16}, "data": {"train": ["-"]}, "parallel": {"base": base}}
    )
    ranks, device = ranks_from_environment(), torch.device("cpu")
    source = ModelFolder(folder)
    model = build_skeleton(source, config.model)
    attach_adapter(model, peft_config(model, config.lora, config.model.base))
    sizes = mesh_sizes(config.parallel, ranks)
    readings = [Reading(0, 0, 0.0)]
    with process_group(ranks, device):
        meshes = build_meshes(sizes, "cpu")
        parallelize(model, meshes, config)
        torch.distributed.barrier()
        before, started = restart_peak(), time.perf_counter()
        read_bytes = fill(model, source, device, 0, meshes.base_replicas, progress=readings.append)
        seconds, peak = time.perf_counter() - started, resident_bytes("VmHWM") - before
        held = check_static_bytes(model, sizes)
    pipe.send((read_bytes, peak, held, seconds, readings[-1].wait_s))


def on_ranks(world_size: int, nodes: int, folder: Path) -> list[tuple[int, int, int, float, float]]:
    """For each rank: bytes read, peak, bytes held, seconds, seconds of waiting for reads."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(target=load, args=(rank, world_size, nodes, port, folder, pipes[rank][1]), daemon=True)
        for rank in range(world_size)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    try:
        return [ours.recv() for ours, _ in pipes]
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        folder = Path(directory) / "model"
        total = write_nf4(folder, args.layers)
        opened = ModelFolder(folder)
        largest = max(
            *(quantized.layout.total_bytes for quantized in opened.quantized.values()),
            *(entry.nbytes for entry in opened.entries.values()),
        )
        console.print(f"{total / 1e9:.2f} GB in 4 bit, {args.layers} layers, {args.ranks} ranks, {cache(args.cold)}")
        table = Table("loader", "read / folder", "peak MiB", "limit MiB", "held MiB", "s", "GB/s in all", "waiting")
        rows: dict[str, list[tuple[str, ...]]] = {}
        seconds: dict[str, list[float]] = {}
        for _ in range(args.repeats):
            for name, nodes in (("base: world", 1), ("base: node, 2 nodes", 2)):
                prepare(folder, args.cold)
                results = on_ranks(args.ranks, nodes, folder)
                rows[name] = [
                    row(f"{name}, rank {rank}", read, peak, held, s, total, wait, held + largest + 64 * MIB)
                    for rank, (read, peak, held, s, wait) in enumerate(results)
                ]
                seconds.setdefault(name, []).append(max(result[3] for result in results))
            prepare(folder, args.cold)
            command = [sys.executable, "-c", THEIRS, str(folder), str(Path(__file__).parent)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            peak, held, s = (float(word) for word in output.stdout.split()[-3:])
            rows["from_pretrained"] = [row("from_pretrained, one process", None, peak, held, s, total)]
            seconds.setdefault("from_pretrained", []).append(s)
    for lines in rows.values():
        for line in lines:
            table.add_row(*line)
    console.print(table)
    for name, times in seconds.items():
        console.print(f"{name}: {statistics.median(times):.2f} s, median of {[round(t, 2) for t in times]}")


def prepare(folder: Path, cold: bool) -> None:
    if cold:
        drop_from_page_cache(folder)


def cache(cold: bool) -> str:
    return "read from the disk" if cold else "read from the page cache"


def row(
    name: str,
    read: float | None,
    peak: float,
    held: float,
    seconds: float,
    total: int,
    wait_s: float | None = None,
    limit: float | None = None,
) -> tuple[str, ...]:
    """A line of the table."""
    return (
        name,
        f"{read / total:.4f}" if read is not None else "mapped",
        f"{peak / MIB:.0f}",
        f"{limit / MIB:.0f}" if limit is not None else "",
        f"{held / MIB:.0f}",
        f"{seconds:.2f}",
        f"{total / 1e9 / seconds:.2f}",
        f"{100 * wait_s / seconds:.0f} %" if wait_s is not None else "",
    )


if __name__ == "__main__":
    main()
