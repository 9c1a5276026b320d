"""Compare a training step in one process with transformers + PEFT + bitsandbytes.

    python benchmarks/step.py --base my-model-nf4 --data my-data.jsonl [--what full|packed|ranks] [--threads 2]

- full: both train on the same rows of `--seq-len` tokens without padding. They start from equal adapters and use
  gradient checkpointing. qlora-dist also runs without recomputation. That needs less memory than transformers with
  checkpointing, as benchmarks/peers/run.py shows. The losses are compared step by step.
- packed: both train on conversations. qlora-dist packs them into rows. For transformers, as many shuffled conversations
  are padded to the longest of the batch, one per row. With `--same` it gets the same ones. Only tokens that are not
  padding count.
- ranks: two ranks of qlora-dist with one thread each are compared with one process of two threads, run in turns.

The variants take turns in each repeat and see the same batches. Medians of wall time and processor time are printed.
Other processes on the machine disturb processor time less. With more than one thread it includes waiting, unless
OMP_WAIT_POLICY=passive is set, which makes every operator wake its threads.

The code with transformers is a typical user's. The 4-bit folder is loaded in bf16, and `get_peft_model` uses its
defaults, which keep the adapter in fp32, with r=16 on all linear layers. A step calls
`model(input_ids, attention_mask, labels)`, clips, and uses torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table

from qlora_dist.adapters.attach import init_lora_weight
from qlora_dist.config.schema import Config
from qlora_dist.data.collate import LABEL_IGNORE_INDEX, Batch
from qlora_dist.parallel.loaded_model import load_trainable_model, shard_model
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.train.run_setup import RunSetup, set_up_run
from qlora_dist.train.train_step import make_step_context, train_step

LR, CLIP = 2e-4, 1.0
Step = Callable[[list[Batch]], float]


def configuration(args: argparse.Namespace, rows: int, checkpointing: str, *, compiled: bool) -> Config:
    train = {"global_batch": args.rows, "micro_batch": rows, "checkpointing": checkpointing, "device": "cpu"}
    if compiled:
        train["compile"] = True
    tree = {
        "model": {"base": args.base, "attention": args.attention} if args.attention else {"base": args.base},
        "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
        "data": {"train": [args.data], "seq_len": args.seq_len},
        "parallel": {"base": args.parallel_base},
        "optim": {"lr": LR, "warmup_steps": 0, "max_grad_norm": CLIP},
        "train": train,
    }
    return Config.model_validate(tree)


def make_qlora_dist_step(config: Config) -> tuple[RunSetup, Step]:
    """Set up qlora-dist on all ranks of the process group, and return its step."""
    setup = set_up_run(config, read_rank_info())
    loaded = load_trainable_model(shard_model(setup.model, config, setup.ranks, setup.device), setup.folder)
    context = make_step_context(setup, loaded)
    setup.model.train()

    def step(micro_batches: list[Batch]) -> float:
        trained = setup.ranks.world_size * sum(int((b.labels != LABEL_IGNORE_INDEX).sum()) for b in micro_batches)
        return train_step(context, micro_batches, trained).loss

    return setup, step


def make_peft_step(args: argparse.Namespace) -> Callable[[dict[str, torch.Tensor]], float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                value = init_lora_weight(name.removeprefix("base_model.model."), parameter.shape, 0)
                assert value is not None
                parameter.copy_(value)
    if args.checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def full_batches(setup: RunSetup, args: argparse.Namespace) -> Iterator[tuple[Batch, dict[str, torch.Tensor]]]:
    """Yield rows without padding or boundaries: the data set's tokens in sequence, all of them trained."""
    ((rows, _),) = setup.loader.sources
    sequences = rows.sequences
    tokens = torch.from_numpy(np.concatenate([sequences.tokens(i) for i in range(len(sequences))])).long()
    for ids in tokens.split(args.rows * args.seq_len):
        ids = ids.view(args.rows, args.seq_len)
        labels = torch.full_like(ids, LABEL_IGNORE_INDEX)
        labels[:, :-1] = ids[:, 1:]
        positions = torch.arange(args.seq_len).expand_as(ids).contiguous()
        theirs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        yield Batch(ids, labels, positions), theirs


def packed_batches(setup: RunSetup, args: argparse.Namespace) -> Iterator[tuple[Batch, dict[str, torch.Tensor]]]:
    """Yield packed rows, and as many shuffled conversations of the same data, one per row, padded to the longest.

    With `--same` the packed rows have the same conversations, so that losses are comparable. But best-fit packing
    groups conversations of similar lengths, which need less padding than a shuffled data set.
    """
    ((rows, _),) = setup.loader.sources
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows.segments), generator=generator).tolist()
    for index in range(10**6):
        (ours,) = setup.loader.micro_batches(index)
        packed = [p for row in setup.loader.row_indices(index) for p in range(*rows.offsets[row : row + 2])]
        chosen = packed
        if not args.same:
            chosen, order = order[: len(packed)], order[len(packed) :]
        shape = len(chosen), int(rows.segments.length[chosen].max())
        ids, mask, labels = (torch.full(shape, v) for v in (rows.pad_token_id, 0, LABEL_IGNORE_INDEX))
        for row, piece in enumerate(chosen):
            sequence, start, length = (
                int(c[piece]) for c in (rows.segments.sequence_index, rows.segments.start, rows.segments.length)
            )
            sequences = rows.sequences.tokens(sequence), rows.sequences.loss_mask(sequence)
            tokens, trained = (torch.from_numpy(t[start : start + length].copy()) for t in sequences)
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens.long(), 1
            labels[row, : len(tokens)] = torch.where(trained, tokens.long(), LABEL_IGNORE_INDEX)
            labels[row, 0] = LABEL_IGNORE_INDEX
        yield ours, {"input_ids": ids, "attention_mask": mask, "labels": labels}


def compare(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    ranks = read_rank_info({})
    with process_group(ranks, torch.device("cpu")):
        variants: dict[str, Step] = {}
        for compiled, checkpointing in product(
            sorted({False, args.compile}), dict.fromkeys((args.checkpointing, "none"))
        ):
            name = "qlora-dist" + ", compiled" * compiled
            name += ", nothing recomputed" * (checkpointing != args.checkpointing)
            config = configuration(args, args.rows, checkpointing, compiled=compiled)
            setup, variants[name] = make_qlora_dist_step(config)
        peft_step = make_peft_step(args)
        batches = (full_batches if args.what == "full" else packed_batches)(setup, args)

        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ("transformers", *variants)}
        losses: dict[str, list[float]] = {name: [] for name in seconds}
        counts: list[tuple[int, int]] = []
        padded = []
        for repeat in range(-args.warmup, args.repeats):
            ours_batch, their_batch = next(batches)
            runs: dict[str, Callable[[], float]] = {"transformers": partial(peft_step, their_batch)}
            runs |= {name: partial(step, [ours_batch]) for name, step in variants.items()}
            for name, run in runs.items():
                started = time.perf_counter(), time.process_time()
                losses[name].append(run())
                if repeat >= 0:
                    seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
            if repeat >= 0:
                ours_tokens = setup.loader.tokens(repeat + args.warmup) if args.what == "packed" else None
                their_tokens = int(their_batch["attention_mask"].sum())
                counts.append((their_tokens, their_tokens if ours_tokens is None else ours_tokens))
                padded.append(their_batch["attention_mask"].numel())
    report(args, seconds, losses, counts, padded)


def report(
    args: argparse.Namespace,
    seconds: dict[str, list[tuple[float, float]]],
    losses: dict[str, list[float]],
    counts: list[tuple[int, int]],
    padded: list[int],
) -> None:
    rate, flops = matrix_rate(args.threads), matrix_flops_per_token(args)
    columns = ("tokens/s", "ratio", "ratio of processor time", "of the matrix rate", "first loss", "last loss")
    table = Table("variant", *columns, "largest difference")
    for name, times in seconds.items():
        side = int(name != "transformers")
        tokens_per_s = statistics.median(n[side] / s for n, (s, _) in zip(counts, times, strict=True))
        ratios = [
            statistics.median(
                (n[side] / ours[i]) / (n[0] / theirs[i])
                for n, theirs, ours in zip(counts, seconds["transformers"], times, strict=True)
            )
            for i in (0, 1)
        ]
        difference = max(abs(a / b - 1) for a, b in zip(losses[name], losses["transformers"], strict=True))
        share = f"{tokens_per_s * flops / rate:.0%}" if args.what == "full" else "-"
        row = [f"{tokens_per_s:.0f}", *(f"{r:.2f}" for r in ratios), share]
        row += [f"{losses[name][0]:.5f}", f"{losses[name][-1]:.5f}"]
        table.add_row(name, *row, f"{difference:.1e}" if args.what == "full" or args.same else "-")
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{args.threads} threads; matrix rate {rate / 1e9:.0f} GFLOP/s in bf16, {flops / 1e9:.2f} GFLOP per token in "
        f"matrices; {statistics.mean(n for _, n in counts):.0f} tokens a step, with transformers "
        f"{statistics.mean(n for n, _ in counts):.0f} and with its padding {statistics.mean(padded):.0f}"
    )


def matrix_rate(threads: int) -> float:
    """Return the best FLOP/s of ten large products in bf16."""
    torch.set_num_threads(threads)
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    times = []
    for _ in range(10):
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def matrix_flops_per_token(args: argparse.Namespace) -> float:
    """Return the FLOP per token of a step in matrix products.

    Each weight counts forward, when recomputed, and backward to its input; the head counts forward and backward.
    """
    config = transformers.AutoConfig.from_pretrained(args.base)
    h, i, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or h // heads
    attention = 2 * h * head_dim * (heads + config.num_key_value_heads)
    weights = config.num_hidden_layers * (attention + 3 * h * i)
    return 2 * weights * (3 if args.checkpointing == "full" else 2) + 2 * 2 * config.vocab_size * h


def worker(args: argparse.Namespace) -> None:
    """Train on one rank; rank 0 prints the tokens per second of all ranks in each step."""
    ranks = read_rank_info()
    torch.set_num_threads(args.threads)
    times = []
    with process_group(ranks, torch.device("cpu")):
        rows = args.rows // ranks.world_size
        setup, step = make_qlora_dist_step(configuration(args, rows, args.checkpointing, compiled=args.compile))
        for index, (batch, _) in enumerate(full_batches(setup, args)):
            if index == args.warmup + args.repeats:
                break
            rank_batch = Batch(*(t[ranks.rank :: ranks.world_size] for t in batch))
            started = time.perf_counter()
            step([rank_batch])
            times.append(time.perf_counter() - started)
    if ranks.rank == 0:
        print(json.dumps([args.rows * args.seq_len / t for t in times[args.warmup :]]))


def compare_ranks(args: argparse.Namespace) -> None:
    base = [a for a in sys.argv[1:] if a not in ("--what", "ranks")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    commands = {
        "one process, two threads": [sys.executable, __file__, *base, "--worker", "--threads", "2"],
        "two ranks": [*torchrun, *base, "--worker", "--threads", "1"],
        "two ranks, base on each": [*torchrun, *base, "--worker", "--threads", "1", "--parallel-base", "replicate"],
    }
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            threads = "2" if name.startswith("one") else "1"
            output = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": threads}
            ).stdout
            rates[name] += json.loads(output.strip().splitlines()[-1])
    table = Table("variant", "tokens/s", "ratio", "min", "max")
    reference = statistics.median(rates["one process, two threads"])
    for name, values in rates.items():
        median = statistics.median(values)
        table.add_row(name, f"{median:.0f}", f"{median / reference:.2f}", f"{min(values):.0f}", f"{max(values):.0f}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="4-bit folder")
    parser.add_argument("--data", required=True, help="JSONL of conversations")
    parser.add_argument("--what", choices=["full", "packed", "ranks"], default="full")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of `--what ranks`")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", choices=["none", "full"], default="full")
    parser.add_argument("--same", action="store_true", help="packed: use the same conversations for both")
    parser.add_argument("--attention", help="value of model.attention; default: the configuration's")
    parser.add_argument("--compile", action="store_true", help="also run compiled (`train.compile`)")
    parser.add_argument("--parallel-base", default="world", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    assert Path(args.base).is_dir()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    if args.worker:
        worker(args)
    elif args.what == "ranks":
        compare_ranks(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
