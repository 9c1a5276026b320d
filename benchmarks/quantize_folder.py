"""Measure quantizing a folder on a CPU: parameters per second, peak memory, waiting for reads; and bitsandbytes.

    python benchmarks/quantize_folder.py [--layers 9] [--threads 2] [--dir /tmp] [--cold] [--sample 4]

The folder has Llama-3.1-8B's layers in bf16 (0.44 GB each). It and its result are removed afterwards. `quantize_folder`
runs in a separate process, and its seconds include writing and syncing the result. Peak is the largest resident memory
(VmHWM) above the memory before. Its bound is the packed form of the largest matrix and a constant. Both exclude the
page cache.

Then bitsandbytes.functional.quantize_4bit and `quantize_weight` take turns on a sample of the matrices (the first
--sample of each shape) in memory, without reading and writing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from rich.console import Console
from synthetic import drop_from_page_cache, resident_bytes, restart_peak, write_bf16

from qlora_dist.io.read_ahead import READ_CHUNK_BYTES
from qlora_dist.io.safetensors_file import SafetensorsReader
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quantize import quantize_weight

MIB = 2**20


def quantize_in_child(source: Path, out: Path, warm_up: Path) -> None:
    """Quantize a folder and print the figures, after a small folder that triggers imports and caches."""
    quantize_folder(warm_up, out.with_name("warm-up"), QuantizeOptions(min_share=0.0))  # the small folder has no layers
    before = restart_peak()
    report = quantize_folder(source, out, QuantizeOptions())
    peak = resident_bytes("VmHWM") - before
    print(report.counts.parameters, report.seconds, report.wait_s, report.read_bytes, peak)


def sample(source: Path, count: int, repeats: int = 3) -> tuple[int, dict[str, float]]:
    """Quantize the first matrices of each shape, and return their weights and the seconds by library.

    The fastest of `repeats` turns counts for each matrix.
    """
    by_shape: dict[tuple[int, ...], list[str]] = {}
    entries = {name: entry for name, entry in ModelFolder(source).entries.items() if ".layers." in name}
    for name, entry in entries.items():
        if len(entry.shape) == 2:
            by_shape.setdefault(entry.shape, []).append(name)
    weights, best = 0, {"ours": 0.0, "bitsandbytes": 0.0}
    with SafetensorsReader() as reader:
        for names in by_shape.values():
            for name in names[:count]:
                weight = reader.read(entries[name])
                weights += weight.numel()
                times: dict[str, list[float]] = {library: [] for library in best}
                for _ in range(repeats):
                    started = time.perf_counter()
                    quantize_weight(weight)
                    between = time.perf_counter()
                    bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
                    times["ours"].append(between - started)
                    times["bitsandbytes"].append(time.perf_counter() - between)
                for library, seconds in times.items():
                    best[library] += min(seconds)
    return weights, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--sample", type=int, default=4)
    parser.add_argument("--child", type=Path, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        quantize_in_child(*args.child)
        return

    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        source, out, warm_up = (Path(directory) / name for name in ("source", "out", "small"))
        total = write_bf16(source, args.layers)
        write_bf16(warm_up, 0)
        if args.cold:
            drop_from_page_cache(source)
        medium = "the disk" if args.cold else "the page cache"
        console.print(f"{total / 1e9:.2f} GB in bf16 from {medium}, {args.threads} threads")
        command = [sys.executable, __file__, "--threads", str(args.threads), "--child"]
        command += map(str, (source, out, warm_up))
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        parameters, seconds, wait_s, read_bytes, peak = (float(word) for word in output.split()[-5:])
        largest = max(entry.shape for entry in ModelFolder(source).entries.values())
        bound = NF4Layout(shape=largest).total_bytes + 2 * READ_CHUNK_BYTES
        console.print(
            f"quantize_folder: {parameters / 1e6 / seconds:.0f} M parameters/s, {read_bytes / 1e9 / seconds:.2f} GB/s, "
            f"{seconds:.1f} s, {100 * wait_s / seconds:.0f} % of it waiting for reads"
        )
        console.print(f"  peak {peak / MIB:.0f} MiB; the largest packed matrix and two chunks: {bound / MIB:.0f} MiB")
        weights, best = sample(source, args.sample)
        rates = {library: weights / 1e6 / library_s for library, library_s in best.items()}
        console.print(
            f"in memory, {weights / 1e6:.0f} M weights: ours {rates['ours']:.0f} M/s, bitsandbytes "
            f"{rates['bitsandbytes']:.0f} M/s, ratio {rates['ours'] / rates['bitsandbytes']:.1f}"
        )
        console.print(
            f"quantize_folder, with reading and writing, against bitsandbytes in memory: "
            f"{parameters / 1e6 / seconds / rates['bitsandbytes']:.1f}"
        )


if __name__ == "__main__":
    main()
