"""Compare loading a 4-bit folder on some numbers of ranks with transformers' loader: time, bytes, memory.

    python benchmarks/loading.py [--layers 38] [--ranks 1,2,4] [--repeats 3] [--cold] [--dir /tmp | --keep FOLDER]
        [--json FILE] [--show FILE]

The folder has Llama-3.1-8B's layers (0.11 GB each in 4 bit; 38 are 4.3 GB) and random codes. It is made under --dir
and removed, or kept in --keep and used again. The loaders take turns:

- ours: each rank is a process with gloo and one thread, which loads with the code of `train`. The base is sharded over
  all ranks; on four and more ranks also as two copies, as on two nodes.
- from_pretrained: the same number of processes, as under torchrun. Each loads the whole model with
  AutoModelForCausalLM and touches every page of the weights, which are otherwise mapped but not read.

Each process first loads a tiny folder, so that imports count neither as time nor as memory. All processes begin
together, and keep their memory until the last one is done.

- Seconds: time of the slowest rank, from opening the folder to the last byte loaded.
- Read: bytes that a rank reads from the files; for mapped files, all bytes.
- Peak of a rank: largest resident memory above the memory before loading (VmHWM, restarted). It excludes the page
  cache but includes mapped pages.
- Held: resident memory when all ranks are done.
- Held by all: the ranks' own memory, and each mapped page once (RssAnon, Pss of files).
- Peak of all: held by all, and each rank's peak above the memory that it holds, as if all peaks coincided.

--cold drops the folder from the page cache before each loading, and shows the bytes read from the disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from loading_table import render_loading_tables

SPARE_BYTES = 2 * 2**30
"""Bytes of the machine's memory that are left to other processes."""


def run_concurrently(functions: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> list[dict[str, Any]]:
    """Run each function in a process with a connection as its last argument, and return the figures that it sends."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in functions]
    processes = [
        context.Process(target=function, args=(*args, pipe[1]), daemon=True)
        for (function, args), pipe in zip(functions, pipes, strict=True)
    ]
    for process, (_, end) in zip(processes, pipes, strict=True):
        process.start()
        end.close()
    try:
        for _ in range(3):  # all are ready, have loaded, and have measured shared pages
            figures = [pipe.recv() for pipe, _ in pipes]
            for pipe, _ in pipes:
                pipe.send(None)
        return figures
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def loaders(numbers: list[int], folder: Path, tiny: Path, total: int) -> Iterator[tuple[str, int, Any, int]]:
    """Yield name, number of ranks, the ranks' functions, and the bytes they hold together, in the order of a repeat."""
    from loading_ranks import (  # late, because torch takes seconds; the ranks are forks and inherit it
        load_with_qlora_dist,
        load_with_transformers,
    )

    for n in numbers:
        for nodes, name in ((1, "ours"), (2, "ours, two copies")):
            if nodes == 1 or (n >= 4 and n % 2 == 0):
                port = free_port()
                yield (
                    name,
                    n,
                    [(load_with_qlora_dist, (rank, n, nodes, port, folder, tiny)) for rank in range(n)],
                    nodes * total,
                )
        yield "from_pretrained", n, [(load_with_transformers, (folder, tiny))] * n, n * total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--ranks", type=lambda text: [int(word) for word in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="parent of the folder")
    parser.add_argument("--keep", type=Path, help="folder to make, or to use if it exists")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--show", type=Path, help="print the table of a file written by --json, and exit")
    args = parser.parse_args()
    if args.show:
        print(render_loading_tables(json.loads(args.show.read_text())))
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        tree = measure(args, args.keep or Path(directory) / "model", Path(directory) / "tiny")
    if args.json:
        args.json.write_text(json.dumps(tree, indent=1) + "\n")
    print(render_loading_tables(tree))


def measure(args: argparse.Namespace, folder: Path, tiny: Path) -> dict[str, Any]:
    import psutil
    import transformers
    from synthetic import drop_from_page_cache, write_nf4

    from qlora_dist.model.model_folder import ModelFolder
    from qlora_dist.runtime.system import machine_info

    transformers.utils.logging.disable_progress_bar()
    if not (folder / "model.safetensors").is_file():
        write_nf4(folder, args.layers)
    write_nf4(tiny, 1, hidden_size=256, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2)
    total = (folder / "model.safetensors").stat().st_size
    model_folder = ModelFolder(folder)
    tensor_bytes = [quantized.layout.total_bytes for quantized in model_folder.quantized.values()]
    tensor_bytes += [entry.nbytes for entry in model_folder.entries.values()]
    runs: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for repeat in range(args.repeats):
        for name, n, functions, held in loaders(args.ranks, folder, tiny, total):
            available = psutil.virtual_memory().available
            if held + SPARE_BYTES > available:
                left_out[f"{name}, {n}"] = f"{held / 1e9:.1f} GB, and {available / 1e9:.1f} GB are available"
                continue
            if args.cold:
                drop_from_page_cache(folder)
            print(f"repeat {repeat + 1} of {args.repeats}: {name}, {n}", file=sys.stderr, flush=True)
            runs.append({"loader": name, "number": n, "repeat": repeat, "ranks": run_concurrently(functions)})
    return {
        "layers": len({key.split(".")[2] for key in model_folder.quantized if ".layers." in key}),
        "folder_bytes": total,
        "largest_tensor_bytes": max(tensor_bytes),
        "cold": args.cold,
        "repeats": args.repeats,
        "machine": machine_info("cpu"),
        "runs": runs,
        "left_out": left_out,
    }


if __name__ == "__main__":
    main()
