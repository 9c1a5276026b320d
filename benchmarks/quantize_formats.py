"""Measure quantizing a folder in a published format to NF4 on a CPU, beside quantizing one in bf16.

    python benchmarks/quantize_formats.py [--gigabytes 4] [--threads 2] [--dir /tmp] [--repeats 3]

Each folder has about the given size. The layers are Llama-3.1-8B's in bf16 and in FP8 with blocks of 128 x 128, and
gpt-oss-20b's with experts in MXFP4. The formats take turns, each in a process of its own, and the median counts.
A process's seconds include writing and syncing the result. Peak is as in `quantize_folder.py`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from quantize_folder import MIB
from rich.console import Console
from rich.table import Table
from synthetic import write_bf16
from synthetic_published import write_fp8, write_mxfp4

WRITERS = {"bf16": (write_bf16, 0.436), "fp8": (write_fp8, 0.218), "mxfp4": (write_mxfp4, 0.45)}
"""Function that writes a folder with a number of layers, and the gigabytes of a layer."""


def quantize_in_process(source: Path, out: Path, warm_up: Path, threads: int) -> tuple[float, float]:
    """Quantize a folder in a process of its own, and return parameters per second and the peak of memory in bytes."""
    program = Path(__file__).with_name("quantize_folder.py")
    command = [sys.executable, str(program), "--threads", str(threads), "--child", *map(str, (source, out, warm_up))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    parameters, seconds, _, _, peak = (float(word) for word in output.split()[-5:])
    return parameters / seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in WRITERS}
    peaks: dict[str, list[float]] = {name: [] for name in WRITERS}
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        root = Path(directory)
        write_bf16(root / "small", 0)
        for name, (write, layer_gigabytes) in WRITERS.items():
            write(root / name, max(1, round(args.gigabytes / layer_gigabytes)))
        for repeat in range(args.repeats):
            for name in WRITERS:
                (root / f"turn-{name}-{repeat}").mkdir()
                out = root / f"turn-{name}-{repeat}" / "out"
                rate, peak = quantize_in_process(root / name, out, root / "small", args.threads)
                subprocess.run(["rm", "-r", str(out.parent)], check=True)
                rates[name].append(rate)
                peaks[name].append(peak)
    table = Table("folder", "M parameters/s, median", "of bf16", "peak MiB, median")
    base = statistics.median(rates["bf16"])
    for name, values in rates.items():
        rate = statistics.median(values)
        table.add_row(name, f"{rate / 1e6:.0f}", f"{rate / base:.2f}", f"{statistics.median(peaks[name]) / MIB:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
