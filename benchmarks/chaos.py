"""Kill a run many times, and check that its result equals the result of an undisturbed run.

    python benchmarks/chaos.py --base my-model-nf4 --data my-data.jsonl [--kills 20] [--steps 60] [--ranks 2]
        [--json FILE]

The first run is undisturbed. A second run with the same configuration is restarted until it is done, and killed with
SIGKILL `--kills` times. Each kill hits one rank or all ranks, at a random moment of a random phase. The phases are the
forward pass, the backward pass, the optimizer step, the writing of a rank's checkpoint file, and its completion by
rank 0. Every loss of every step and every byte of the adapter must be equal. If they are not, the exit code is 1.

Ranks are forked from this process with torchrun's environment variables, so that torch is imported once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qlora_dist.checkpoint.checkpointer import Checkpointer
from qlora_dist.checkpoint.manifest import find_checkpoints
from qlora_dist.config.schema import Config
from qlora_dist.optim.adamw import PagedAdamW
from qlora_dist.runs.run_dir import DONE_MARKER, run_path
from qlora_dist.train import trainer
from qlora_dist.train.run_training import run_training

PHASES = ("forward", "backward", "update", "write", "complete")
_LONGEST_RUN_S = 900.0


@dataclass(kw_only=True)
class Kill:
    """A kill: its victim, its moment, and its consequences."""

    victim: int | str
    """A rank, or `all`."""
    phase: str
    steps: int
    """Number of the step (or checkpoint) after the start in which the victim is killed, from 1."""
    delay_s: float
    """Seconds after the phase's beginning."""
    after_step: int = 0
    """Last step in the metrics."""
    goes_on_from: int = 0
    """Step of the newest complete checkpoint."""


def configuration(args: argparse.Namespace, name: str) -> Config:
    return Config.model_validate(
        {
            "model": {"base": args.base, "compute_dtype": args.dtype},
            "lora": {"r": 8, "dropout": 0.1},
            "data": {"train": [args.data], "seq_len": args.seq_len},
            "parallel": {"base": "world"},
            "optim": {"lr": 1e-3, "warmup_steps": 2},
            "train": {
                "steps": args.steps,
                "global_batch": 2 * args.ranks,
                "save_every": 3,
                "eval_every": 0,
                "device": "cpu",
                "seed": args.seed,
            },
            "run": {"dir": args.out, "name": name},
        }
    )


def install_kill(kill: Kill) -> None:
    """Arrange in the victim's process that it is killed at the chosen moment."""
    count = 0

    def kill_self() -> None:
        time.sleep(kill.delay_s)
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_during(owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == kill.steps:
                threading.Thread(target=kill_self, daemon=True).start()
            return function(*args, **kwargs)

        setattr(owner, name, counted)

    match kill.phase:
        case "forward":
            kill_during(trainer, "train_step")
        case "backward":
            kill_during(torch.Tensor, "backward")
        case "update":
            kill_during(PagedAdamW, "step")
        case "write":
            kill_during(Checkpointer, "_write_rank_file")
        case "complete":
            kill_during(Checkpointer, "_commit_checkpoint")


def rank_main(config: Config, environ: dict[str, str], kill: Kill | None, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environ)
    torch.set_num_threads(1)
    if kill is not None and kill.victim in ("all", int(environ["RANK"])):
        install_kill(kill)
    run_training(config)


def run_attempt(config: Config, ranks: int, kill: Kill | None, log: str) -> bool:
    """Start all ranks, end the others when one fails, and return whether the run is done."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    context = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        environ = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        process = context.Process(target=rank_main, args=(config, environ, kill, log))
        process.start()
        processes.append(process)
    deadline = time.monotonic() + _LONGEST_RUN_S
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run hangs; see {log}")
        time.sleep(0.02)
    if kill is not None and kill.victim == "all":  # as close to the same moment as possible
        for process in processes:
            process.kill()
    for process in processes:
        process.join(10)  # a survivor exits automatically once it detects the failed rank
        process.kill()
        process.join()
    return all(p.exitcode == 0 for p in processes)


def losses_and_adapter_hash(config: Config) -> tuple[dict[int, float], str]:
    """Return the losses by step, and the adapter's sha256."""
    path = run_path(config.run)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    adapter = hashlib.sha256((path / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert len({row["step"] for row in rows}) == len(rows), "the metrics have a step twice"
    return {row["step"]: row["loss"] for row in rows if "loss" in row}, adapter


def last_step(config: Config) -> int:
    steps = [0]
    try:
        lines = (run_path(config.run) / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    for line in lines:
        try:
            steps.append(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue
    return max(steps)


def newest_step(config: Config) -> int:
    checkpoints = find_checkpoints(run_path(config.run) / "checkpoints")
    return int(checkpoints[0].name.removeprefix("step-")) if checkpoints else 0


def draw_kill(rng: random.Random, index: int, args: argparse.Namespace, left: int) -> Kill:
    phase = PHASES[index % len(PHASES)]
    victims = [*range(args.ranks), "all"]
    victim = 0 if phase == "complete" else rng.choice(victims)  # only rank 0 completes a checkpoint
    max_steps = max(1, min(left - 2, 2 * args.steps // max(args.kills, 1)))
    steps = rng.randint(1, max_steps)
    if phase in ("write", "complete"):
        steps = 1 if max_steps < 6 else rng.randint(1, max_steps // 3)
    if phase == "backward":
        steps = 2 * steps - rng.randint(0, 1)  # two micro-batches a step
    delay_s = rng.uniform(0, 0.02 if phase in ("write", "complete", "update") else 0.2)
    return Kill(victim=victim, phase=phase, steps=steps, delay_s=delay_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="runs/chaos")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    args = parser.parse_args()
    rng, console = random.Random(args.seed), Console()

    reference, chaos = (configuration(args, name) for name in ("undisturbed", "killed"))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for config in (reference, chaos):
        if run_path(config.run).exists():
            console.print(f"{run_path(config.run)}: exists; give another --out")
            return 2
    log = str(Path(args.out) / "output.log")
    if not run_attempt(reference, args.ranks, None, log):
        console.print(f"the undisturbed run failed; see {log}")
        return 1

    kills: list[Kill] = []
    while len(kills) < args.kills and not (run_path(chaos.run) / DONE_MARKER).exists():
        kill = draw_kill(rng, len(kills), args, args.steps - newest_step(chaos))
        if run_attempt(chaos, args.ranks, kill, log):
            break
        kill.after_step, kill.goes_on_from = last_step(chaos), newest_step(chaos)
        kills.append(kill)
        console.print(f"{len(kills)}: {kill.victim} in {kill.phase}, after step {kill.after_step}", highlight=False)
    done = (run_path(chaos.run) / DONE_MARKER).exists() or run_attempt(chaos, args.ranks, None, log)

    table = Table("kill", "victim", "during", "after step", "resumes from", "steps repeated")
    for number, kill in enumerate(kills, start=1):
        repeated = kill.after_step - kill.goes_on_from
        cells = (number, kill.victim, kill.phase, kill.after_step, kill.goes_on_from, repeated)
        table.add_row(*map(str, cells))
    console.print(table)
    if not done:
        console.print(f"the last start failed; see {log}")
        return 1
    (losses, adapter), (expected_losses, expected_adapter) = map(losses_and_adapter_hash, (chaos, reference))
    equal_losses, equal_adapters = losses == expected_losses, adapter == expected_adapter
    console.print(
        f"{len(kills)} kills; losses of {len(expected_losses)} steps {'equal' if equal_losses else 'DIFFER'}, "
        f"adapter's bytes {'equal' if equal_adapters else 'DIFFER'}"
    )
    if args.json:
        tree = {"kills": [asdict(k) for k in kills], "equal_losses": equal_losses, "equal_adapters": equal_adapters}
        Path(args.json).write_text(json.dumps(tree, indent=2) + "\n")
    return 0 if equal_losses and equal_adapters and len(kills) == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
