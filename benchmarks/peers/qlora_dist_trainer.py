"""qlora-dist with the code of `train`: setup, sharding, loading, step."""

from __future__ import annotations

import argparse
import os

import torch
from marks import RANK, WORLD_SIZE, mark_and_restart_peak, static_bytes, steps, wait_for_turn, write_mark
from workload import configuration

from qlora_dist.data.collate import LABEL_IGNORE_INDEX, Batch
from qlora_dist.parallel.loaded_model import load_trainable_model, shard_model
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.train_step import make_step_context, train_step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--parallel-base", default="world")
    parser.add_argument("--checkpointing", default="full")
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ranks = read_rank_info()
    options = {name: getattr(args, name) for name in ("parallel_base", "checkpointing", "compiled")}
    config = configuration(args.base, args.data, args.rows, args.seq_len, args.rows // WORLD_SIZE, **options)
    with process_group(ranks, torch.device("cpu")):
        setup = set_up_run(config, ranks)
        mark_and_restart_peak("imported")  # with tokenizer and data, which the others do not load
        loaded = load_trainable_model(shard_model(setup.model, config, setup.ranks, setup.device), setup.folder)
        context = make_step_context(setup, loaded)
        setup.model.train()
        mark_and_restart_peak("loaded")
        for step in steps():
            wait_for_turn()
            global_batch = [torch.tensor(part) for part in step["ours"]]
            trained = int((global_batch[1] != LABEL_IGNORE_INDEX).sum())
            batch = Batch(*(part[RANK::WORLD_SIZE] for part in global_batch))
            result = train_step(context, [batch], trained)
            write_mark("step")
            write_mark("loss", loss=result.loss)
            del batch, global_batch
        write_mark("end", static_bytes=static_bytes())
        write_mark("engine", engine=f"base: {args.parallel_base}")


if __name__ == "__main__":
    main()
