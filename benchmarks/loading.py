"""Loading a 4-bit folder on one rank and several, and transformers' loader beside it: time, bytes, memory.

python benchmarks/loading.py [--layers 38] [--ranks 1,2,4] [--repeats 3] [--cold] [--dir /tmp | --keep FOLDER]
    [--json FILE] [--show FILE]

The folder has Llama-3.1-8B's layers (0.11 GB each in 4 bit; 38 are 4.3 GB) and random codes. It is made under --dir
and removed, or kept in --keep and used again. Loaders take turns, A B A B.

ours: ranks are processes with gloo and one thread each, which load by the code of `train`: skeleton, adapter,
sharding, every rank's bytes. The base is over all ranks; on four and more also as two copies, as on two nodes.
from_pretrained: what transformers does under torchrun, as many processes, each loading the whole with
AutoModelForCausalLM and touching every page of the weights: without that they are mapped and not yet read. Before that
each loads a tiny folder, so that imports count neither as time nor as memory. All begin together and keep what they
have until the last is done.

Seconds are those of the slowest rank, from opening the folder to the last byte in its place. Read: bytes asked of the
files by a rank; what is mapped is all of it. Peak of a rank: the most that was resident, beyond what was before
(VmHWM, restarted): the page cache is not in it, but where files are mapped their pages are. Held: what is resident
when all are done. Held by all: their own memory, and of mapped files each page once, however many map it (RssAnon, Pss
of files). Peak of all: that, and what each had at its peak beyond what it holds, as if all peaks were at once. --cold
takes the folder out of the page cache before each loading, and tells what came from the disk.
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
"""Of the machine's memory, left to everything else."""


def run_concurrently(functions: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> list[dict[str, Any]]:
    """Run each in a process, the connection to here as last argument: what it sends in the end."""
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
        for _ in range(3):  # all are ready; have loaded; have looked at what they share
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
    """Name, ranks, what to run on each, and the bytes that they hold together, in the order of a repeat."""
    from loading_ranks import (  # behind the arguments: torch takes seconds. The ranks are forks and have it
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
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the folder is made")
    parser.add_argument("--keep", type=Path, help="a folder to make, or to use if it is there")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--show", type=Path, help="only print the table of a file that --json has written")
    args = parser.parse_args()
    if args.show:
        print(render_loading_tables(json.loads(args.show.read_text())))
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        tree = measure(args, args.save or Path(directory) / "model", Path(directory) / "tiny")
    if args.json:
        args.json.write_text(json.dumps(tree, indent=1) + "\n")
    print(render_loading_tables(tree))


def measure(args: argparse.Namespace, folder: Path, tiny: Path) -> dict[str, Any]:
    import psutil
    import transformers
    from synthetic import drop_from_page_cache, write_nf4

    from qlora_dist.model.model_folder import ModelFolder
    from qlora_dist.runtime.machine_info import machine_info

    transformers.utils.logging.disable_progress_bar()
    if not (folder / "model.safetensors").is_file():
        write_nf4(folder, args.layers)
    write_nf4(tiny, 1, hidden_size=256, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2)
    total = (folder / "model.safetensors").stat().st_size
    opened = ModelFolder(folder)
    largest = [quantized.layout.total_bytes for quantized in opened.quantized.values()]
    largest += [entry.nbytes for entry in opened.entries.values()]
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
        "layers": len({key.split(".")[2] for key in opened.quantized if ".layers." in key}),
        "folder_bytes": total,
        "largest_tensor_bytes": max(largest),
        "cold": args.cold,
        "repeats": args.repeats,
        "machine": machine_info("cpu"),
        "runs": runs,
        "left_out": left_out,
    }


if __name__ == "__main__":
    main()
