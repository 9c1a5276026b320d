"""Compare implementations of the loss over a large vocabulary: qlora-dist's, torch's chunked one, plain logits.

    python benchmarks/head_loss.py [--tokens 512] [--hidden 576] [--vocabulary 49152] [--dtype bf16] [--repeats 5]

The figures are error, seconds and peak memory of forward and backward with respect to the hidden states. One third of
the tokens is untrained. The implementations take turns in each repeat, and medians are printed. Each peak is measured
in a separate process.
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


LOSSES: dict[str, Loss] = {
    "qlora-dist": lambda hidden, weight, labels: linear_cross_entropy_sum(hidden, weight, None, labels),
    "plain logits": plain,
    "torch, auto": torch_chunked("auto"),
    "torch, compact": torch_chunked("compact"),
}


def inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    torch.manual_seed(0)
    # filled in place, because a temporary tensor would hide the peaks
    hidden = torch.empty(args.tokens, args.hidden, dtype=dtype).normal_().requires_grad_()
    weight = torch.empty(args.vocabulary, args.hidden, dtype=dtype).normal_(std=0.05)
    labels = torch.randint(0, args.vocabulary, (args.tokens,))
    labels[::3] = IGNORE_INDEX
    return hidden, weight, labels


def peak_mib(name: str, arguments: list[str]) -> float:
    """Return the MiB that a loss adds to the process's peak, beyond its inputs."""
    command = [sys.executable, __file__, *arguments, "--only", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=list(LOSSES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    hidden, weight, labels = inputs(args)

    if args.only:
        Path("/proc/self/clear_refs").write_text("5")  # restart VmHWM (Linux)
        before = peak_memory_bytes(torch.device("cpu"))
        LOSSES[args.only](hidden, weight, labels).backward()
        print((peak_memory_bytes(torch.device("cpu")) - before) / 2**20)
        return

    reference = plain(hidden.detach().double(), weight.double(), labels).item()
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    values: dict[str, float] = {}
    for _ in range(args.repeats):
        for name, loss in LOSSES.items():
            hidden.grad = None
            started = time.perf_counter()
            value = loss(hidden, weight, labels)
            value.backward()
            seconds[name].append(time.perf_counter() - started)
            values[name] = value.item()

    table = Table("loss", "error of the sum", "s (median)", "min", "max", "peak MiB")
    for name, times in seconds.items():
        error = abs(values[name] / reference - 1)
        row = [f"{error:.1e}", *(f"{f(times):.3f}" for f in (statistics.median, min, max))]
        table.add_row(name, *row, f"{peak_mib(name, sys.argv[1:]):.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
