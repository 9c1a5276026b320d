"""Measure the time of a step, waiting and memory of training with a paged base, by the resident share of the layers.

    python benchmarks/base_paging.py [--layers 16] [--hidden 2048] [--steps 4] [--tokens 64] [--shares 1 0.5 0.25 0]
        [--ahead 0 1] [--to disk] [--cold] [--dir /tmp] [--json FILE]

Each row is a separate run of `qlora-dist train` on a temporary folder of random codes with Llama's layers. The first
run has a base that fits (base: node). The others page it, with each resident share of the layers (0 means two layers),
with and without prefetching. All runs must have equal losses.

Time and waiting are medians over all steps but the first. Peak is the largest VmHWM of the process, which this program
reads every 20 ms. Saved is its difference from the base that fits, and should equal the layers' bytes minus the budget.
The runs set MALLOC_MMAP_THRESHOLD_. Otherwise glibc would keep varying parts of freed layers, and peaks would vary by
100 MiB and more. The file of pages is in the system's page cache. --cold drops it from there all the time, so that
pages come from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table
from synthetic import write_nf4
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qlora_dist.config.schema import Config
from qlora_dist.model.meta_model import build_meta_model, get_decoder_layers
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.runtime.byte_sizes import align_bytes

MIB = 2**20
MAX_TOKENS = 4096


def write_base(folder: Path, args: argparse.Namespace) -> None:
    """Write a model with the proportions of Llama-3.2-1B, and a tokenizer with a token for each byte."""
    heads = args.hidden // 64
    settings = {"hidden_size": args.hidden, "intermediate_size": 11 * args.hidden // 4, "num_attention_heads": heads}
    write_nf4(folder, args.layers, **settings, num_key_value_heads=heads // 4, max_position_embeddings=MAX_TOKENS)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_tokenizer = Tokenizer(models.BPE({"<end>": 0} | {byte: n + 1 for n, byte in enumerate(alphabet)}, []))
    byte_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)


def layer_sizes(config: Config) -> list[int]:
    """Return the bytes of each layer's frozen parameters in a page."""
    model = build_meta_model(ModelFolder(config.model.base), config.model)
    return [sum(align_bytes(p.nbytes) for p in layer.parameters()) for layer in get_decoder_layers(model)]


def configuration(folder: Path, args: argparse.Namespace, name: str, parallel: dict[str, Any], ahead: int) -> Config:
    return Config.model_validate(
        {
            "model": {"base": str(folder / "model")},
            "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
            "data": {"train": [str(folder / "data.jsonl")], "seq_len": args.tokens, "cache": str(folder / "cache")},
            "parallel": parallel,
            "paging": {"dir": str(folder), "to": args.to, "ahead": ahead},
            "optim": {"lr": 1e-3, "warmup_steps": 0},
            "train": {
                "steps": args.steps,
                "global_batch": args.rows,
                "checkpointing": args.checkpointing,
                "save_every": 0,
                "device": "cpu",
            },
            "run": {"dir": str(folder / "runs"), "name": name},
        }
    )


def train(config: Config, *, cold: bool) -> tuple[list[dict[str, Any]], int]:
    """Train in a separate process, and return its metrics and its peak."""
    folder = Path(config.run.dir) / config.run.name
    folder.mkdir(parents=True)
    path = folder.with_suffix(".yaml")
    path.write_text(config.model_dump_json())  # JSON is YAML
    with (folder.with_suffix(".txt")).open("w") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "qlora_dist", "train", str(path), "run.overwrite=true"],
            stdout=output,
            stderr=output,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)},
        )
        peak = 0
        while run.poll() is None:
            peak = max(peak, peak_bytes(run.pid))
            if cold:
                drop_pages(run.pid)
            time.sleep(0.02)
    if run.returncode:
        raise SystemExit(folder.with_suffix(".txt").read_text())
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], peak


def peak_bytes(pid: int) -> int:
    """Return the VmHWM of a process, or 0 while it is exiting."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def drop_pages(pid: int) -> None:
    """Drop a process's file of pages, which is unlinked, from the page cache."""
    try:
        files = [f for f in Path(f"/proc/{pid}/fd").iterdir() if ".pages (deleted)" in str(f.readlink())]
        for file in files:
            descriptor = os.open(file, os.O_RDWR)
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    except OSError:
        pass  # the process has just ended


def measure_run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    rows, peak = train(config, cold=args.cold)
    steps = [row for row in rows if "loss" in row]
    later = steps[1:] or steps
    paging = [row.get("base_paging", {"bytes_in": 0, "stall_s": 0.0}) for row in later]
    return {
        "losses": [row["loss"] for row in steps],
        "step_s": statistics.median(row["step_s"] for row in later),
        "stall_s": statistics.median(counts["stall_s"] for counts in paging),
        "bytes_in": paging[-1]["bytes_in"],
        "resident_bytes": steps[-1].get("base_resident_bytes"),
        "peak_bytes": peak,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--shares", type=float, nargs="*", default=[1, 0.5, 0.25, 0])
    parser.add_argument("--ahead", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--checkpointing", default="full")
    parser.add_argument("--to", choices=["host", "disk"], default="disk")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        folder = Path(directory)
        write_base(folder / "model", args)
        text = "one text, as long as a row is. " * MAX_TOKENS
        (folder / "data.jsonl").write_text(
            "".join(json.dumps({"text": text[n : n + args.tokens - 1]}) + "\n" for n in range(8))
        )
        unpaged = configuration(folder, args, "fits", {"base": "node"}, 1)
        sizes = layer_sizes(unpaged)
        runs = [{"share": None, "ahead": None} | measure_run(unpaged, args)]
        for share in args.shares:
            for ahead in args.ahead:
                budget = int(share * sum(sizes)) if share else 0
                parallel = {"base": "paged", "resident_bytes": budget}
                config = configuration(folder, args, f"paged-{share}-{ahead}", parallel, ahead)
                runs.append({"share": share, "ahead": ahead} | measure_run(config, args))
    print_runs(runs, sizes)
    equal = all(run["losses"] == runs[0]["losses"] for run in runs)
    print(f"losses of {len(runs)} runs: {'equal' if equal else 'NOT EQUAL'}")
    if args.json:
        tree = {"layers": len(sizes), "layers_bytes": sum(sizes), "equal_losses": equal, "runs": runs}
        Path(args.json).write_text(json.dumps(tree, indent=2) + "\n")
    return 0 if equal else 1


def print_runs(runs: list[dict[str, Any]], sizes: list[int]) -> None:
    console = Console(width=120)
    console.print(f"{len(sizes)} layers, {sum(sizes) / MIB:.0f} MiB")
    table = Table(
        "budget", "ahead", "on the device MiB", "fetched a step MiB", "step s", "waiting s", "peak MiB", "saved MiB"
    )
    for run in runs:
        resident_bytes = run["resident_bytes"]
        table.add_row(
            "fits" if run["share"] is None else f"{100 * run['share']:.0f} %" if run["share"] else "two layers",
            "" if run["ahead"] is None else str(run["ahead"]),
            "" if resident_bytes is None else f"{resident_bytes / MIB:.0f}",
            f"{run['bytes_in'] / MIB:.0f}",
            f"{run['step_s']:.2f}",
            f"{run['stall_s']:.2f}",
            f"{run['peak_bytes'] / MIB:.0f}",
            f"{(runs[0]['peak_bytes'] - run['peak_bytes']) / MIB:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
