"""Measure peak memory and parameters per second of merging from file to file, for each target format.

    python benchmarks/merge.py [--layers 9] [--dir /tmp] [--into dequantized nf4 nf4-feedback original]

The model has Llama-3.1-8B's layers (0.44 GB each in bf16), and the adapter has rank 16 on every linear layer. Both have
random values, and are removed afterwards with the results. Each merge runs in a separate process. Seconds include
writing and syncing. Peak is the largest resident memory (VmHWM) above the memory before, without the page cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from synthetic import resident_bytes, restart_peak, write_bf16

from qlora_dist.merge.merge_folder import merge_folder, print_merge_report
from qlora_dist.merge.merge_plan import MergeOptions
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions

RANK = 16
MERGES = {
    "dequantized": MergeOptions(),
    "nf4": MergeOptions(into="nf4"),
    "nf4-feedback": MergeOptions(into="nf4", error_feedback=True),
    "original": MergeOptions(into="original"),
}


def write_adapter(source: Path, out: Path) -> None:
    torch.manual_seed(0)
    out.mkdir()
    tensors = {}
    for name, entry in ModelFolder(source).entries.items():
        if name.endswith("_proj.weight"):
            (rows, columns), module = entry.shape, f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns) / columns**0.5
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, RANK) * 1e-3
    save_file(tensors, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (out / "adapter_config.json").write_text(json.dumps(config))


def merge_in_child(base: Path, adapter: Path, out: Path, into: str) -> None:
    console = Console(highlight=False, soft_wrap=True)
    before, started = restart_peak(), time.perf_counter()
    report = merge_folder(base, adapter, out, MERGES[into], console)
    seconds, peak = time.perf_counter() - started, resident_bytes("VmHWM") - before
    print_merge_report(report, console)
    folder = ModelFolder(out)
    parameters = sum(torch.Size(folder.shape(name)).numel() for name in [*folder.entries, *folder.quantized])
    console.print(
        f"{into}: {parameters / 1e9:.2f} G parameters in {seconds:.0f} s, {parameters / 1e6 / seconds:.0f} M/s; peak "
        f"{peak / 2**20:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--into", nargs="+", choices=MERGES, default=list(MERGES))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        *paths, into = args.child
        merge_in_child(*map(Path, paths), into)
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        source, adapter, quantized, out = (Path(directory) / name for name in ("source", "adapter", "nf4", "out"))
        write_bf16(source, args.layers)
        write_adapter(source, adapter)
        quantize_folder(source, quantized, QuantizeOptions())
        for into in args.into:
            base = source if into == "original" else quantized
            command = [sys.executable, __file__, "--child", *map(str, (base, adapter, out)), into]
            subprocess.run(command, check=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
