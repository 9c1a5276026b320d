"""Compare the memory and traffic of a traced step with real ranks on this machine.

    python benchmarks/plan_real.py --base models/SmolLM2-135M-nf4 [--ranks 1 2 4] [--seq-len 512] [KEY=VALUE...]

`trace/live_memory.py` counts the tensors of both; the real ranks are processes on CPUs with gloo. The exit code is 1
if weights or bytes of a step differ at all, or the peak by more than 2 %.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qlora_dist.config.config_file import config_from_tree
from qlora_dist.config.schema import Config
from qlora_dist.data.collate import Batch
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.parallel.loaded_model import load_trainable_model, shard_model
from qlora_dist.parallel.static_bytes import model_static_bytes
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.trace.live_memory import LayerPhase
from qlora_dist.trace.trace_step import record_peaks, trace_checkpoint
from qlora_dist.train.run_setup import set_up_model

Figures = tuple[int, dict[str, int], dict[str, int]]
"""Bytes of the weights, bytes at the peak of each phase, and bytes received by mesh dimension."""


def measure_real_step(config: Config) -> Figures:
    """Run two steps of a rank, and return the figures of the second."""
    ranks, device = read_rank_info(), torch.device("cpu")
    folder, model, _ = set_up_model(config)
    with process_group(ranks, device):
        loaded = load_trainable_model(shard_model(model, config, ranks, device), folder)
        shape = config.train.micro_batch, config.data.seq_len
        ids, positions = torch.randint(3, 1000, shape), torch.arange(shape[1]).expand(shape).contiguous()
        count = config.train.global_batch // (shape[0] * ranks.world_size)
        micro_batches = [Batch(ids.clone(), ids.clone(), positions.clone()) for _ in range(count)]
        replicas = loaded.meshes.sizes.adapter_replicas
        memory, _ = record_peaks(
            model, loaded.optimizer_state, micro_batches, replicas, config, loaded.traffic, steps=2
        )
        return model_static_bytes(model), peak_by_phase(memory.peaks), loaded.traffic.take()


def measure_traced_step(config: Config, world_size: int) -> Figures:
    """Return the figures of a trace of all layers."""
    trace = trace_checkpoint(config, ModelFolder(config.model.base), world_size, device="cpu")
    return trace.weights_bytes, peak_by_phase(trace.peaks), trace.traffic


def peak_by_phase(peaks: Mapping[LayerPhase, int]) -> dict[str, int]:
    """Return the largest peak of each phase."""
    largest: dict[str, int] = {}
    for (phase, _), nbytes in peaks.items():
        largest[phase] = max(largest.get(phase, 0), nbytes)
    return largest


def run_in_processes(environments: list[dict[str, str]], function: Any, *args: Any) -> list[Figures]:
    """Run a function in one process per environment."""
    with tempfile.TemporaryDirectory() as folder:
        context, processes = multiprocessing.get_context("fork"), []
        for index, environment in enumerate(environments):
            target = (Path(folder) / f"{index}.json", environment, function, args)
            processes.append(context.Process(target=_write, args=target))
            processes[-1].start()
        for process in processes:
            process.join()
        return [tuple(json.loads((Path(folder) / f"{index}.json").read_text())) for index in range(len(environments))]  # type: ignore[misc]


def _write(path: Path, environment: dict[str, str], function: Any, args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    path.write_text(json.dumps(function(*args)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--port", type=int, default=29577)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    table = Table("ranks", "weights", "received in a step", "phase", "real MiB", "trace MiB", "difference")
    mismatches = 0
    for world_size in args.ranks:
        tree: dict[str, dict[str, Any]] = {
            "model": {"base": args.base},
            "data": {"train": ["none.jsonl"], "seq_len": args.seq_len, "packing": "none"},
            "lora": {"r": 16, "dropout": 0.0},
            "optim": {"name": "adamw"},
            "parallel": {"base": "world"},
            "train": {"micro_batch": 1, "global_batch": 2 * world_size},
        }
        config = config_from_tree(tree, args.overrides)
        environments = [
            {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
            for rank in range(world_size)
        ]
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port + world_size)}
        ranks = run_in_processes(
            [{k: str(v) for k, v in e.items()} | master for e in environments], measure_real_step, config
        )
        (trace,) = run_in_processes([{}], measure_traced_step, config, world_size)
        for weights, phases, received in ranks[:1]:
            peaks = {"peak": (max(phases.values()), max(trace[1].values()))}
            peaks |= {phase: (nbytes, trace[1][phase]) for phase, nbytes in phases.items()}
            for name, (real, traced) in peaks.items():
                row = [str(world_size), "=" if weights == trace[0] else f"{weights} {trace[0]}"]
                row += ["=" if received == trace[2] else f"{received} {trace[2]}", name]
                row += [f"{real / 2**20:.3f}", f"{traced / 2**20:.3f}", f"{100 * (traced / real - 1):+.3f} %"]
                table.add_row(*row)
        for weights, phases, received in ranks:
            error = max(trace[1].values()) / max(phases.values()) - 1
            mismatches += weights != trace[0] or received != trace[2] or abs(error) > 0.02
    Console(width=140).print(table)
    print(f"{mismatches} ranks differ from the trace")
    sys.exit(mismatches > 0)


if __name__ == "__main__":
    main()
