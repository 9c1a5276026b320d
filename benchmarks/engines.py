"""Compare the engines on the same ranks: bytes held, memory and time of a step, traffic, losses.

    python benchmarks/engines.py [--layers 8] [--hidden 1024] [--ranks 1 2 4] [--steps 6] [--tokens 64] [--repeats 2]
        [--dir /tmp] [--json FILE]

Each row is a separate run under torchrun, on a temporary folder of random codes with Llama's layers. The engines take
turns. `parallel/static_bytes.py` counts the bytes held. The memory on top is the growth of the process's peak (VmHWM)
from loading to the last step. Times are medians over the steps of all repeats, without the first step of each run.
Losses must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from base_paging import write_base
from rich.console import Console
from rich.table import Table
from synthetic import resident_bytes, restart_peak

from qlora_dist.config.schema import Config
from qlora_dist.data.collate import LABEL_IGNORE_INDEX
from qlora_dist.parallel.loaded_model import load_trainable_model, shard_model
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.train_step import make_step_context, train_step

MIB = 2**20


def configuration(folder: Path, engine: str, ranks: int, args: argparse.Namespace) -> Config:
    return Config.model_validate(
        {
            "model": {"base": str(folder / "model")},
            "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
            "data": {"train": [str(folder / "data.jsonl")], "seq_len": args.tokens, "cache": str(folder / "cache")},
            "parallel": {"engine": engine, "base": "world"},
            "optim": {"lr": 1e-3, "warmup_steps": 0},
            "train": {"global_batch": 2 * ranks, "micro_batch": 1, "device": "cpu"},
        }
    )


def measure(folder: Path, engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train on each rank, and return the figures of this rank."""
    ranks = read_rank_info()
    config = configuration(folder, engine, ranks.world_size, args)
    setup = set_up_run(config, ranks)
    with process_group(ranks, setup.device):
        loaded = load_trainable_model(shard_model(setup.model, config, ranks, setup.device), setup.folder)
        context = replace(make_step_context(setup, loaded), max_grad_norm=1.0)
        setup.model.train()
        loaded_peak = restart_peak()
        seconds, processor, losses = [], [], []
        for step in range(args.steps):
            micro_batches = setup.loader.micro_batches(step)
            trained = ranks.world_size * sum(int((b.labels != LABEL_IGNORE_INDEX).sum()) for b in micro_batches)
            started, cpu = time.perf_counter(), time.process_time()
            result = train_step(context, micro_batches, trained)
            seconds.append(time.perf_counter() - started)
            processor.append(time.process_time() - cpu)
            losses.append(result.loss)
            received = sum(loaded.traffic.take().values())
        on_top = resident_bytes("VmHWM") - loaded_peak
    return {
        "held": loaded.static_bytes,
        "on_top": on_top,
        "seconds": seconds[1:],
        "processor": processor[1:],
        "received": received,
        "losses": losses,
    }


def run(folder: Path, engine: str, ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    out = folder / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), __file__]
    command += ["--worker", engine, "--dir", str(folder), "--tokens", str(args.tokens), "--steps", str(args.steps)]
    environ = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(MIB), "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, check=True, env=os.environ | environ)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dir", default=None)
    parser.add_argument("--json", default=None)
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        result = measure(Path(args.dir), args.worker, args)
        if read_rank_info().rank == 0:
            (Path(args.dir) / "result.json").write_text(json.dumps(result))
        return
    results: dict[tuple[int, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        write_base(folder / "model", args)
        (folder / "data.jsonl").write_text((json.dumps({"text": "What is measured is known. " * 40}) + "\n") * 20)
        for ranks in args.ranks:
            for _ in range(args.repeats):
                for engine in ("fsdp2", "zero3"):
                    results.setdefault((ranks, engine), []).append(run(folder, engine, ranks, args))
    print_results(results)
    if args.json:
        Path(args.json).write_text(json.dumps({f"{r} {e}": runs for (r, e), runs in results.items()}))


def print_results(results: dict[tuple[int, str], list[dict[str, Any]]]) -> None:
    columns = ["ranks", "engine", "held, MiB", "on top, MiB", "step, s", "processor, s", "received, MiB", "loss"]
    table = Table(*columns, box=None)
    for (ranks, engine), runs in results.items():
        first = runs[0]
        reference = results[ranks, "fsdp2"][0]["losses"]
        assert all(abs(a - b) <= 1e-3 * b for r in runs for a, b in zip(r["losses"], reference, strict=True))
        table.add_row(
            str(ranks),
            engine,
            f"{first['held'] / MIB:.1f}",
            f"{statistics.median(r['on_top'] for r in runs) / MIB:.0f}",
            f"{statistics.median(s for r in runs for s in r['seconds']):.2f}",
            f"{statistics.median(s for r in runs for s in r['processor']):.2f}",
            f"{first['received'] / MIB:.1f}",
            f"{first['losses'][-1]:.5f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
