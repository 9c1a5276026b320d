"""Measure the cost of paging AdamW's moments, by the part of them that stays on the device.

    python benchmarks/paging.py [--elements 33554432] [--bits 32] [--to disk|host] [--page-bytes 16MiB] [--repeats 9]

One process updates shards of `--elements` trained parameters. torch's AdamW (bitsandbytes' in 8 bit) and the paged
AdamW take turns. The budgets are 100, 50, 10 and 0 % of the moments, with and without prefetching. For each budget it
prints medians of the update's seconds and of the ratio to the unpaged update in the same round. It also prints the
bytes moved and the seconds of waiting.

A second measurement checks a statement of section 4 of the QLoRA paper. It says: "for 65B at batch 16 paged optimizers
provide the same training speed as regular optimizers". There, a computation precedes each update, as in a step with a
large batch. It takes `--compute` times as long as paging half of the moments, and the ratio is of whole steps.
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


@dataclass(kw_only=True)
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
    name = "torch" if bits == 32 else "bitsandbytes"
    return OptimizerVariant(name=name, update=optimizer.step, optimizer=None)


def paged(args: argparse.Namespace, shards: list[nn.Parameter], share: float, ahead: int) -> OptimizerVariant:
    def make_state(resident_bytes: int) -> tuple[PagedOptimizerState, OptimConfig]:
        config = OptimConfig.model_validate(
            {"name": f"paged-adamw-{args.bits}bit", "resident_bytes": resident_bytes, "weight_decay": 0.01}
        )
        paging = PagingConfig.model_validate({"to": args.to, "page_bytes": args.page_bytes, "ahead": ahead})
        return PagedOptimizerState([SHARD] * len(shards), config, paging, CPU), config

    resident, _ = make_state(2**62)
    total = resident.pager.total_bytes
    resident.close()
    budget = max(int(share * total), 2 * args.page_bytes) if share else 0
    optimizer = PagedAdamW(shards, *make_state(budget))
    name = f"{share:.0%}" + ("" if share == 1 else f", {ahead} ahead")
    return OptimizerVariant(name=name, update=optimizer.step, optimizer=optimizer)


def spin_cpu(seconds: float) -> None:
    """Compute for about this time."""
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(left, right)


def measure(variants: list[OptimizerVariant], repeats: int, compute_s: float = 0.0) -> None:
    """Measure the variants in turns, with ratios to the first one."""
    for variant in variants:
        variant.seconds, variant.ratios, variant.stalls = [], [], []
        for _ in range(2):
            variant.update()
    for _ in range(repeats):
        for variant in variants:
            if variant.optimizer is not None:
                variant.optimizer.optimizer_state.pager.take_counts()
            started = time.perf_counter()
            if compute_s:
                spin_cpu(compute_s)
            variant.update()
            variant.seconds.append(time.perf_counter() - started)
            variant.ratios.append(variant.seconds[-1] / variants[0].seconds[-1])
            if variant.optimizer is not None:
                counts = variant.optimizer.optimizer_state.pager.take_counts()
                variant.stalls.append(counts.stall_s)
                variant.moved = counts.bytes_in + counts.bytes_out


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
    variants = [unpaged(shards, args.bits), *(paged(args, shards, *budget) for budget in budgets)]
    measure(variants, args.repeats)
    console, rows = Console(stderr=args.json), []
    table = Table("resident", "update s", "ratio", "moved MiB", "stall s", title=f"{args.elements:,} elements")
    for variant in variants:
        stall = statistics.median(variant.stalls) if variant.stalls else 0.0
        row = (statistics.median(variant.seconds), statistics.median(variant.ratios), variant.moved / 2**20, stall)
        table.add_row(variant.name, *(f"{value:.3f}" if value < 100 else f"{value:,.0f}" for value in row))
        keys = ("resident", "seconds", "ratio", "moved_mib", "stall_s")
        rows.append(dict(zip(keys, (variant.name, *row), strict=True)))
    console.print(table)

    by_name = {variant.name: variant for variant in variants}
    half = by_name["50%, 1 ahead"]
    paging_s = statistics.median(by_name["50%, 0 ahead"].stalls)
    measure([variants[0], half], args.repeats, args.compute * paging_s)
    speed = 1 / statistics.median(half.ratios)
    console.print(
        f"computation of {args.compute * paging_s:.2f} s before the update, {args.compute:g} times the time of paging "
        f"half of the moments: speed {speed:.3f} of unpaged"
    )
    if args.json:
        print(json.dumps({"rows": rows, "paged_speed": speed, "compute_s": args.compute * paging_s}))


if __name__ == "__main__":
    main()
