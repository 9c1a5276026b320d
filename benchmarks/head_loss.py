"""The loss over a large vocabulary: ours, torch's chunked one, plain logits. Error, seconds, peak memory.

python benchmarks/head_loss.py [--tokens 512] [--hidden 576] [--vocabulary 49152] [--dtype bf16] [--repeats 5]

Forward and backward with respect to the hidden states, one third of the tokens untrained. The ways take turns in each
repeat; medians are printed. Each peak is of a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy

from qlora_dist.model.loss import IGNORE_INDEX, linear_cross_entropy_sum
from qlora_dist.runtime.device_memory import peak_memory_bytes

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(linear(hidden, weight).float(), labels, reduction="sum")


def torch_chunked(policy: str) -> Loss:
    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        options = LinearCrossEntropyOptions(acc_policy=policy)
        return linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)

    return loss


WAYS: dict[str, Loss] = {
    "qlora-dist": lambda hidden, weight, labels: linear_cross_entropy_sum(hidden, weight, None, labels),
    "plain logits": plain,
    "torch, auto": torch_chunked("auto"),
    "torch, compact": torch_chunked("compact"),
}


def inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    torch.manual_seed(0)
    # filled in place: a temporary of the inputs would hide the peaks that are compared
    hidden = torch.empty(args.tokens, args.hidden, dtype=dtype).normal_().requires_grad_()
    weight = torch.empty(args.vocabulary, args.hidden, dtype=dtype).normal_(std=0.05)
    labels = torch.randint(0, args.vocabulary, (args.tokens,))
    labels[::3] = IGNORE_INDEX
    return hidden, weight, labels


def peak_of(way: str, arguments: list[str]) -> float:
    """MiB that the way adds to the process's peak, beyond its inputs."""
    command = [sys.executable, __file__, *arguments, "--only", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    hidden, weight, labels = inputs(args)

    if args.only:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
        before = peak_memory_bytes(torch.device("cpu"))
        WAYS[args.only](hidden, weight, labels).backward()
        print((peak_memory_bytes(torch.device("cpu")) - before) / 2**20)
        return

    reference = plain(hidden.detach().double(), weight.double(), labels).item()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    values: dict[str, float] = {}
    for _ in range(args.repeats):
        for way, loss in WAYS.items():
            hidden.grad = None
            started = time.perf_counter()
            value = loss(hidden, weight, labels)
            value.backward()
            seconds[way].append(time.perf_counter() - started)
            values[way] = value.item()

    table = Table("way", "error of the sum", "s (median)", "min", "max", "peak MiB")
    for way, times in seconds.items():
        error = abs(values[way] / reference - 1)
        row = [f"{error:.1e}", *(f"{f(times):.3f}" for f in (statistics.median, min, max))]
        table.add_row(way, *row, f"{peak_of(way, sys.argv[1:]):.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
