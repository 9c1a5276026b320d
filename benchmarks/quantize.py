"""Compare the weights quantized per second on a CPU with bitsandbytes, in turns in one process.

    python benchmarks/quantize.py [--weights 33554432] [--repeats 5] [--threads 2]

The bytes are compared first. The figures are medians and their ratios for bf16 and fp32, NF4 and FP4, with double
quantization at block size 64. With more than one thread, qlora-dist is also timed on one thread in the same turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import bitsandbytes.functional as bnb
import torch
from rich.console import Console
from rich.table import Table

from qlora_dist.nf4.quantize import quantize_weight


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=2**25)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.manual_seed(0)
    several = args.threads > 1

    columns = ["type", "codes", "bitsandbytes, M/s", "ours, M/s", "ratio"]
    table = Table(*columns, *(["ours on one thread, M/s", "gain of threads"] if several else []))
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.empty(args.weights, dtype=dtype).normal_(std=0.02)
        for quant_type in ("nf4", "fp4"):
            ours = partial(quantize_weight, weight, quant_type)
            theirs = partial(bnb.quantize_4bit, weight, blocksize=64, compress_statistics=True, quant_type=quant_type)
            packed, layout = ours()
            codes, state = theirs()
            assert torch.equal(packed[layout.codes], codes.flatten())
            assert torch.equal(packed[layout.absmax], state.absmax)

            variants = [("bitsandbytes", theirs, args.threads), ("ours", ours, args.threads)]
            variants += [("one", ours, 1)] if several else []
            times: dict[str, list[float]] = {name: [] for name, _, _ in variants}
            for _ in range(args.repeats):
                for name, function, threads in variants:
                    torch.set_num_threads(threads)
                    times[name].append(seconds(function))
            rates = {name: args.weights / statistics.median(t) / 1e6 for name, t in times.items()}
            theirs_rate, our_rate = rates["bitsandbytes"], rates["ours"]
            row = [f"{theirs_rate:.0f}", f"{our_rate:.0f}", f"{our_rate / theirs_rate:.1f}"]
            row += [f"{rates['one']:.0f}", f"{our_rate / rates['one']:.2f}"] if several else []
            table.add_row(str(dtype).removeprefix("torch."), quant_type, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
