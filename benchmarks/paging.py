"""What it costs to page the moments of AdamW, by what stays on the device.

python benchmarks/paging.py [--elements 33554432] [--bits 32] [--to disk|host] [--page-bytes 16MiB] [--repeats 9]

One process updates a rank's shards, as large as those of `--elements` trained parameters, in turns by torch's AdamW
(bitsandbytes' in 8 bit) and by ours with a budget of 100, 50, 10 and 0 % of the moments, with and without fetching
ahead. Per budget: the median of the update's seconds, and of its ratio to the unpaged update in the same round; bytes
moved and seconds of waiting. Then the paper's statement in kind ("for 65B at batch 16 paged optimizers provide the same
training speed as regular optimizers", QLoRA, section 4): the same with a computation in front that takes `--compute`
times as long as paging half of the moments, which is what a step of a large batch is; the ratio is that of whole steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import bitsandbytes
import torch
from pydantic import ByteSize, TypeAdapter
from rich.console import Console
from rich.table import Table
from torch import nn

from qlora_dist.config.sections import OptimConfig, PagingConfig
from qlora_dist.optim.adamw import PagedAdamW
from qlora_dist.optim.optimizer_state import PagedOptimizerState

CPU = torch.device("cpu")
SHARD = 2**18


@dataclass
class OptimizerVariant:
    name: str
    update: Callable[[], None]
    optimizer: PagedAdamW | None
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    moved: int = 0


def make_shards(elements: int) -> list[nn.Parameter]:
    shards = [nn.Parameter(torch.randn(SHARD)) for _ in range(elements // SHARD)]
    for shard in shards:
        shard.grad = torch.randn(SHARD)
    return shards


def unpaged(shards: list[nn.Parameter], bits: int) -> OptimizerVariant:
    optimizer = torch.optim.AdamW(shards, fused=True) if bits == 32 else bitsandbytes.optim.AdamW8bit(shards)
    return OptimizerVariant("torch" if bits == 32 else "bitsandbytes", optimizer.step, None)


def paged(args: argparse.Namespace, shards: list[nn.Parameter], share: float, ahead: int) -> OptimizerVariant:
    def moments(resident_bytes: int) -> tuple[PagedOptimizerState, OptimConfig]:
        config = OptimConfig.model_validate(
            {"name": f"paged-adamw-{args.bits}bit", "resident_bytes": resident_bytes, "weight_decay": 0.01}
        )
        paging = PagingConfig.model_validate({"to": args.to, "page_bytes": args.page_bytes, "ahead": ahead})
        return PagedOptimizerState([SHARD] * len(shards), config, paging, CPU), config

    whole, _ = moments(2**62)
    total = whole.pager.total_bytes
    whole.close()
    budget = max(int(share * total), 2 * args.page_bytes) if share else 0
    ours, config = moments(budget)
    optimizer = PagedAdamW(shards, ours, config)
    return OptimizerVariant(f"{share:.0%}" + ("" if share == 1 else f", {ahead} ahead"), optimizer.step, optimizer)


def spin_cpu(seconds: float) -> None:
    """A computation of about so long."""
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(left, right)


def measure(ways: list[OptimizerVariant], repeats: int, compute_s: float = 0.0) -> None:
    """In turns, the first way being what the others are compared with."""
    for way in ways:
        way.seconds, way.ratios, way.stalls = [], [], []
        for _ in range(2):
            way.update()
    for _ in range(repeats):
        for way in ways:
            if way.optimizer is not None:
                way.optimizer.optimizer_state.pager.take_counts()
            started = time.perf_counter()
            if compute_s:
                spin_cpu(compute_s)
            way.update()
            way.seconds.append(time.perf_counter() - started)
            way.ratios.append(way.seconds[-1] / ways[0].seconds[-1])
            if way.optimizer is not None:
                counts = way.optimizer.optimizer_state.pager.take_counts()
                way.stalls.append(counts.stall_s)
                way.moved = counts.bytes_in + counts.bytes_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**25)
    parser.add_argument("--bits", type=int, choices=(32, 8), default=32)
    parser.add_argument("--to", choices=("disk", "host"), default="disk")
    parser.add_argument(
        "--page-bytes", type=lambda text: int(TypeAdapter(ByteSize).validate_python(text)), default=2**24
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compute", type=float, default=10.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(1)
    shards = make_shards(args.elements)
    budgets = [(1.0, 1), *itertools.product((0.5, 0.1, 0.0), (1, 0))]
    ways = [unpaged(shards, args.bits), *(paged(args, shards, *budget) for budget in budgets)]
    measure(ways, args.repeats)
    console, rows = Console(stderr=args.json), []
    table = Table("resident", "update s", "ratio", "moved MiB", "stall s", title=f"{args.elements:,} elements")
    for way in ways:
        stall = statistics.median(way.stalls) if way.stalls else 0.0
        row = (statistics.median(way.seconds), statistics.median(way.ratios), way.moved / 2**20, stall)
        table.add_row(way.name, *(f"{value:.3f}" if value < 100 else f"{value:,.0f}" for value in row))
        rows.append(dict(zip(("resident", "seconds", "ratio", "moved_mib", "stall_s"), (way.name, *row), strict=True)))
    console.print(table)

    by_name = {way.name: way for way in ways}
    half = by_name["50%, 1 ahead"]
    paging_s = statistics.median(by_name["50%, 0 ahead"].stalls)
    pair = [ways[0], half]
    measure(pair, args.repeats, args.compute * paging_s)
    speed = 1 / statistics.median(half.ratios)
    console.print(
        f"computation of {args.compute * paging_s:.2f} s before the update, {args.compute:g} times what paging half of "
        f"the moments takes: speed {speed:.3f} of unpaged"
    )
    if args.json:
        print(json.dumps({"rows": rows, "paged_speed": speed, "compute_s": args.compute * paging_s}))


if __name__ == "__main__":
    main()
